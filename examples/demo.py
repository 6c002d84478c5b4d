"""The whole way in one run: convert the shipped mini-LLaVA with lazy layers, ask about shipped images, check the answers.

Prints one row per question with the KV bytes held against those of a full cache and the speeds; exits with 1 when an
answer is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path

from ggml_qcache import Llama
from ggml_qcache.cli import main as qcache
from ggml_qcache_convert import convert
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent / "mini-llava"

# what `convert_to_gguf --lazy-layers auto --lazy-metric js --lazy-budget 0.355` chose on training scenes
LAZY_LAYERS = "1-7,9-15,17-23,25-27,29-31"
LAZY_MODE = "visual"


def main() -> int:
    """Runs the demo and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu-layers", type=int, default=0, help="layers to compute on the GPU, from the last; -1: all")
    args = parser.parse_args()
    console = Console(width=max(Console().width, 110))
    questions = json.loads((HERE / "images" / "questions.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        model, mmproj = Path(folder) / "mini-llava.gguf", Path(folder) / "mini-llava-mmproj.gguf"
        convert(HERE / "model", model, mmproj, outtype="f16", lazy_layers=LAZY_LAYERS, lazy_mode=LAZY_MODE, progress=True)
        qcache(["inspect", str(model)])
        with contextlib.closing(Llama(str(model), mmproj_path=str(mmproj), n_ctx=1024, n_gpu_layers=args.gpu_layers)) as llm:
            console.print(f"attention on {llm.device_report()['attention']}")
            table, n_right = ask_all(llm, questions)
    console.print(table)
    console.print(f"{n_right} of {len(questions)} answers are right")
    return 0 if n_right == len(questions) else 1


def ask_all(llm: Llama, questions: list[dict[str, str]]) -> tuple[Table, int]:
    """Asks every question about its image.

    Args:
        llm: The model.
        questions: Rows with ``image`` (file name), ``task``, ``question`` and ``answer``.

    Returns:
        A table with a row a question, and the number of right answers.
    """
    table = Table(title="mini-LLaVA with lazy attention", show_lines=True)
    for heading in ("image", "question", "answer", "expected", "", "KV bytes", "of full", "prefill tok/s", "decode tok/s"):
        table.add_column(heading, justify="right" if "tok/s" in heading or "KV" in heading or "of" in heading else "left")
    n_right = 0
    for item in questions:
        content = [
            {"type": "image_url", "image_url": {"url": str(HERE / "images" / item["image"])}},
            {"type": "text", "text": item["question"]},
        ]
        reply = llm.create_chat_completion(messages=[{"role": "user", "content": content}], temperature=0.0, max_tokens=200)
        answer = reply["choices"][0]["message"]["content"].strip()
        right = answer == item["answer"]
        n_right += right
        usage, timings = llm.kv_cache_usage(), llm.last_timings
        table.add_row(
            item["image"],
            item["question"],
            answer,
            item["answer"],
            "[green]✓[/]" if right else "[red]✗[/]",
            f"{usage['bytes']:,}",
            f"{usage['bytes'] / usage['bytes_if_full']:.0%}",
            f"{1e3 * timings['prefill_tokens'] / timings['prefill_ms']:.0f}",
            f"{1e3 * timings['decode_tokens'] / max(timings['decode_ms'], 1e-3):.0f}",
        )
    return table, n_right


if __name__ == "__main__":
    sys.exit(main())
