"""How long calibration takes on a big model, and in how much memory, from models of its shapes with a few layers.

A sample is a prompt of 576 visual tokens and a greedy answer of 32 tokens. Each part is timed with several numbers of layers:
decoding an answer, prefilling a sample and comparing every pair of layers on it, checking a plan on the final logits, and with
`--correct` correcting. The seconds of a part are a polynomial in the number of layers (of degree 1, for the comparison of degree 2),
fitted and read off at the wanted number; so is the peak of memory. Encoding the images isn't part of it: the models have random weights and no vision tower.

    python bench/bench_calibration.py --preset llava-1.5-7b --layers 2,4,6 --samples 2 --json calibration.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp
import numpy as np
from ggml_qcache.native import Model
from ggml_qcache_convert.calibration import LOOK_BLOCK_TOKENS, N_SEQ_MAX, CalibrationSettings
from ggml_qcache_convert.calibration.calibrate import N_CHECKED, measure_samples
from ggml_qcache_convert.calibration.correct import correct
from ggml_qcache_convert.calibration.runner import Runner
from ggml_qcache_convert.calibration.samples import Sample
from ggml_qcache_convert.lazy_layers import leaders_of
from machine import facts, write_result
from make_model import PRESETS, make_model

_QUIET = llama_cpp.llama_log_callback(lambda level, text, data: None)
N_VISUAL, N_ANSWER, N_TEXT = 576, 32, 40
N_CORRECTED = 4  # samples that corrections are made on, the least that a refit takes
DEGREES = {"answer": 1, "measure": 2, "check": 1, "correct": 1, "peak_bytes": 1}


def make_sample(model: Model, rng: np.random.Generator) -> Sample:
    """A prompt with its answer, of random tokens and embeddings."""
    n = N_TEXT + N_VISUAL + N_ANSWER
    visual = np.zeros(n, bool)
    visual[6 : 6 + N_VISUAL] = True
    tokens = np.where(visual, -1, rng.integers(3, model.info.n_vocab, n)).astype(np.int32)
    embeddings = rng.normal(0, 0.02, (n, model.info.n_embd)).astype(np.float32)
    first = N_TEXT + N_VISUAL - 1
    rows = np.concatenate([np.sort(rng.choice(np.arange(6, first), 32, replace=False)), np.arange(first, n)])
    return Sample(tokens, embeddings, visual, rows, rows >= first)


def run(path: Path, n_samples: int, threads: int, corrects: bool) -> dict[str, float]:
    """Times one model, in a process of its own so that the peak is its own."""
    llama_cpp.llama_log_set(_QUIET, None)
    rng = np.random.default_rng(0)
    result: dict[str, float] = {}
    with Model(path) as model:
        result["model_bytes"] = float(model.info.n_bytes)
        llm: Any = SimpleNamespace(native_model=model, model_path=str(path))
        samples = [make_sample(model, rng) for _ in range(n_samples)]
        settings, n_layer = CalibrationSettings(images=[], mode="visual"), model.info.n_layer
        leaders = leaders_of([layer for layer in range(n_layer) if layer % 4], n_layer)  # 3 of 4 layers lazy
        runner = Runner(llm, settings.mode, threads)
        with runner.context(None, n_ctx=1024, n_seq_max=N_SEQ_MAX, block_tokens=LOOK_BLOCK_TOKENS) as context:
            context.decode(samples[0].tokens[:64], samples[0].embeddings[:64], modality=samples[0].visual[:64])
            started = time.monotonic()
            for _ in range(N_ANSWER):
                context.decode([5])
            result["answer"] = time.monotonic() - started

            def prefilled() -> Iterator[Sample]:
                for sample in samples:
                    context.clear()
                    context.decode(sample.tokens, sample.embeddings, modality=sample.visual)
                    yield sample

            started = time.monotonic()
            measured = measure_samples(runner, context, prefilled(), n_samples, settings)
            result["measure"] = (time.monotonic() - started) / n_samples
        started = time.monotonic()
        runner.kl(leaders, measured.part([0]))
        result["check"] = time.monotonic() - started
        if corrects:
            started = time.monotonic()
            four = (samples * N_CORRECTED)[:N_CORRECTED]
            correct(llm, leaders, four, settings.mode, align_heads=True, vis_bias=True, refit=True, n_threads=threads)
            result["correct"] = time.monotonic() - started
    result["peak_bytes"] = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return result


def extrapolated(layers: Sequence[int], values: Sequence[float], degree: int, n_layer: int) -> float:
    """The fitted polynomial at another number of layers."""
    return float(np.polyval(np.polyfit(layers, values, degree), n_layer))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=list(PRESETS), default="llava-1.5-7b")
    p.add_argument("--type", default="q4_0", help="weight type")
    p.add_argument("--layers", default="4,8,12", help="numbers of layers, three or more")
    p.add_argument("--samples", type=int, default=2, help="samples timed")
    p.add_argument("--correct", action="store_true", help="time all corrections too, on four samples: many minutes")
    p.add_argument("--images", type=int, default=16, help="images to extrapolate to")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--shrink", type=int, default=1, help="as make_model, for tests")
    p.add_argument("--json", type=Path)
    args = p.parse_args(argv)
    result = facts("calibration", argv)
    layers = [int(n) for n in args.layers.split(",")]
    n_layer = PRESETS[args.preset].n_layer
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for n in layers:
            path = Path(folder) / f"{n}.gguf"
            make_model(args.preset, path, n_layer=n, weight_type=args.type, shrink=args.shrink)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                rows.append(pool.submit(run, path, args.samples, args.threads, args.correct).result())
            path.unlink()
            print(f"{n} layers: " + ", ".join(f"{name} {value:.3g}" for name, value in rows[-1].items()), flush=True)
    at = {name: extrapolated(layers, [row[name] for row in rows], degree, n_layer) for name, degree in DEGREES.items() if name in rows[0]}
    model_bytes = extrapolated(layers, [row["model_bytes"] for row in rows], 1, n_layer)
    minutes = {
        "answer": args.images * at["answer"] / 60,
        "measure": args.images * at["measure"] / 60,
        "check": min(args.images, N_CHECKED) * at["check"] / 60,
    }
    if args.correct:
        minutes["correct"] = at["correct"] / 60
    result |= {
        "layers": layers, "rows": rows, "n_layer": n_layer, "images": args.images, "minutes": minutes,
        "peak_over_model": at["peak_bytes"] / model_bytes,
    }  # fmt: skip
    print(
        f"{args.preset}, {n_layer} layers, {args.images} images: answers {minutes['answer']:.1f} min, measuring {minutes['measure']:.1f} min, "
        f"checking the plan {minutes['check']:.1f} min; peak {at['peak_bytes'] / 1e9:.1f} GB, {result['peak_over_model']:.2f} of the weights"
        + (f"; corrections on {N_CORRECTED} samples {minutes['correct']:.1f} min" if args.correct else "")
    )
    if args.json:
        write_result(result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
