"""The command ``qcache``: ask a model about images, measure what lazy layers cost, and look into model files."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ggml_qcache_convert.writer import AtomicFiles
from rich.console import Console
from tqdm import tqdm

from . import Llama, QCacheError, __version__
from .comparison import diff_files
from .comparison import draw as draw_diff
from .evaluation import draw as draw_rows
from .evaluation import evaluate, read_items
from .inspection import draw, inspect_file
from .native import KV_TYPES
from .validation import validate_file


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; the process's own by default.

    Returns:
        Exit status: 0 done, 1 failed, 130 interrupted; of ``diff`` 0 the same, 1 different, 2 failed. Wrong usage exits with 2.
    """
    args = _parser().parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return args.failed
    except (QCacheError, ValueError, OSError) as error:
        print(f"qcache: error: {' '.join(str(error).split())}", file=sys.stderr)
        return args.failed
    except KeyboardInterrupt:
        print("qcache: interrupted", file=sys.stderr)
        return 130
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qcache", description="Multimodal models with lazy attention and a Q Cache.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(failed=1)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="answer a prompt about images", description="Answer a prompt about images.")
    run.set_defaults(run=_run)
    run.add_argument("model", metavar="MODEL", help="text GGUF")
    run.add_argument("--mmproj", metavar="FILE", help="vision GGUF of the model; needed for images")
    run.add_argument("--image", metavar="FILE", action="append", default=[], help="path or URL of an image; repeatable")
    run.add_argument("-p", "--prompt", required=True, help="what to ask")
    run.add_argument("--temp", type=float, default=0.0, help="temperature, 0: always the likeliest token (default: 0)")
    run.add_argument("--seed", type=int, help="seed of sampling")
    run.add_argument("--allow-http", action="store_true", help="fetch images from http(s) URLs")
    run.add_argument("--json", action="store_true", help="print answer and measurements as JSON when done")
    run.add_argument("--stats", action="store_true", help="print every measurement")
    run.add_argument("--verbose", action="store_true", help="log what the libraries do")

    test = commands.add_parser(
        "eval",
        help="ask questions with known answers, beside the untouched model",
        description="Ask questions about images whose answers are known; with --against show what a file lost.",
    )
    test.set_defaults(run=_eval)
    test.add_argument("model", metavar="MODEL", help="text GGUF")
    test.add_argument("--mmproj", metavar="FILE", required=True, help="vision GGUF of the model")
    test.add_argument(
        "--data", metavar="FILE", required=True, help='JSON Lines: {"image": PATH, "question": TEXT, "answer": TEXT, "task": TEXT}'
    )
    test.add_argument("--against", metavar="MODEL", help="text GGUF of the untouched model, which runs with every layer full")
    test.add_argument("--limit", type=int, metavar="N", help="the first N questions only")
    test.add_argument("--json", metavar="FILE", help="write the rows there too")
    test.add_argument("--no-progress", action="store_true", help="no progress bar")

    look = commands.add_parser(
        "inspect", help="show what is in a model file", description="Show architecture, sizes and Lazy Blocks of a file."
    )
    look.set_defaults(run=_inspect)
    look.add_argument("file", metavar="FILE", help="text GGUF or mmproj GGUF")
    look.add_argument("--json", action="store_true", help="print JSON")
    check = commands.add_parser(
        "validate",
        help="check the lazy layers of a model file",
        description="Check keys and tensors of lazy layers and of the tokenizer against docs/gguf.md; exit status 1 if anything is wrong.",
    )
    check.set_defaults(run=_validate)
    check.add_argument("file", metavar="FILE", help="text GGUF")
    compare = commands.add_parser(
        "diff",
        help="show how two model files differ",
        description="Compare keys, tensors and Lazy Blocks of two files; exit status 0: the same, 1: different, 2: trouble.",
    )
    compare.set_defaults(run=_diff, failed=2)
    compare.add_argument("a", metavar="A", help="GGUF")
    compare.add_argument("b", metavar="B", help="GGUF")
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.add_argument("--no-progress", action="store_true", help="no progress bar")
    for command in (run, test):
        command.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
        command.add_argument("--n-ctx", type=int, default=4096, metavar="N", help="longest prompt and answer (default: 4096)")
        command.add_argument("--gpu-layers", type=int, default=0, metavar="N", help="last layers to compute on a GPU, -1: all (default: 0)")
        command.add_argument("--threads", type=int, metavar="N", help="threads (default: all cores)")
        command.add_argument("--lazy-layers", default="auto", metavar="SPEC", help="auto, none, or e.g. 5-7,9-15,drop:20 (default: auto)")
        command.add_argument(
            "--v-skip", type=float, default=0.0, metavar="SHARE", help="attention that lazy layers may leave out (default: 0, none)"
        )
        command.add_argument("--lazy-mode", choices=("visual", "global"), help="which tokens share (default: as the file says)")
    for command, purpose in ((run, "of the cache"), (test, "of the cache"), (look, "to reckon with")):
        for name in ("k", "v"):
            command.add_argument(
                f"--type-{name}", choices=tuple(KV_TYPES), default="f16", help=f"type of {name.upper()} {purpose} (default: f16)"
            )
    return parser


def _run(args: argparse.Namespace) -> None:
    llm = Llama(
        args.model,
        mmproj_path=args.mmproj,
        lazy_layers=args.lazy_layers,
        lazy_mode=args.lazy_mode,
        v_skip=args.v_skip,
        n_gpu_layers=args.gpu_layers,
        n_ctx=args.n_ctx,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        type_k=args.type_k,
        type_v=args.type_v,
        allow_http=args.allow_http,
        verbose=args.verbose,
    )
    content: Any = [{"type": "image_url", "image_url": {"url": image}} for image in args.image]
    content.append({"type": "text", "text": args.prompt})
    answer = ""
    finish_reason = None
    chunks = llm.create_chat_completion(
        [{"role": "user", "content": content}],
        max_tokens=args.max_tokens,
        temperature=args.temp,
        seed=args.seed,
        stream=True,
    )
    for chunk in chunks:
        text = chunk["choices"][0]["delta"].get("content", "")
        finish_reason = chunk["choices"][0]["finish_reason"]
        answer += text
        if not args.json:
            print(text, end="", flush=True)
    usage, timings, device = llm.kv_cache_usage(), llm.last_timings, llm.device_report()
    llm.close()
    if args.json:
        result = {"answer": answer, "finish_reason": finish_reason, "kv_cache": usage, "timings": timings, "device": device}
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    print(flush=True)
    print(_summary(usage, timings), file=sys.stderr)
    if args.stats:
        for name, value in (usage | timings | device).items():
            print(f"  {name}: {value:,}" if isinstance(value, (int, float)) else f"  {name}: {value}", file=sys.stderr)


def _summary(usage: dict[str, Any], timings: dict[str, float]) -> str:
    """KV bytes and speed in one line."""

    def speed(phase: str) -> str:
        tokens, ms = timings[f"{phase}_tokens"], timings[f"{phase}_ms"]
        return f"{phase} {1e3 * tokens / ms:.1f} tokens/s" if ms > 0 else f"{phase} none"

    share = usage["bytes"] / usage["bytes_if_full"] if usage["bytes_if_full"] else 1.0
    return (
        f"KV cache {usage['bytes']:,} bytes, {share:.1%} of the {usage['bytes_if_full']:,} of a full one; "
        f"image {timings['image_ms']:.0f} ms, {speed('prefill')}, {speed('decode')}"
    )


def _eval(args: argparse.Namespace) -> None:
    items = read_items(args.data)
    if args.limit is not None:
        if args.limit < 1:
            raise ValueError(f"--limit {args.limit} leaves no questions")
        items = items[: args.limit]
    threads = {"n_threads": args.threads, "n_threads_batch": args.threads}
    kept = {"mmproj_path": args.mmproj, "n_ctx": args.n_ctx, "n_gpu_layers": args.gpu_layers, "verbose": False, **threads}
    with contextlib.ExitStack() as stack:
        models = []
        if args.against is not None:
            models.append(("untouched", stack.enter_context(Llama(args.against, lazy_layers="none", **kept))))
        lazy = {"lazy_layers": args.lazy_layers, "lazy_mode": args.lazy_mode, "v_skip": args.v_skip, "type_k": args.type_k, "type_v": args.type_v}
        models.append((os.path.basename(args.model), stack.enter_context(Llama(args.model, **lazy, **kept))))
        rows = evaluate(models, tqdm(items, unit="question", disable=args.no_progress), args.max_tokens)
    if args.json:
        out = Path(args.json)
        with AtomicFiles([out]) as files:
            files.path(out).write_text(json.dumps({"data": os.fspath(args.data), "rows": rows}, indent=1) + "\n", encoding="utf-8")
            files.commit()
    draw_rows(rows, Console())


def _validate(args: argparse.Namespace) -> None:
    problems = validate_file(args.file)
    for problem in problems:
        print(f"{args.file}: {problem}")
    if problems:
        raise ValueError(f"{args.file}: {len(problems)} problem{'s' if len(problems) > 1 else ''}")
    print(f"{args.file}: valid")


def _diff(args: argparse.Namespace) -> int:
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc="comparing", disable=args.no_progress or not sys.stderr.isatty()) as bar:
        facts = diff_files(args.a, args.b, bar.update)
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        # into a file or a pipe a line a difference, however long
        draw_diff(facts, Console() if sys.stdout.isatty() else Console(width=200))
    return 0 if facts["same"] else 1


def _inspect(args: argparse.Namespace) -> None:
    facts = inspect_file(args.file, args.type_k, args.type_v)
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        draw(facts, Console())
