"""Decode steps of ggml-qcache against llama.cpp: same weights, same tokens, same process, taking turns.

For each context and number of sequences, llama.cpp runs alone with each of its settings first. Then its fastest two and every
lazy mode of ours hold their caches at the same time and take single steps in a random order, so that whatever else the machine
does hits all of them; the faster of the two is the peer. Before anything is timed, logits of both engines are compared.

Columns: `kv_gbps` is the KV read by what the context adds to a step: (KV bytes - those of a 16-token context) over (time -
that of a 16-token context); `bandwidth_share` is that over the bandwidth measured in the same run: of reading, or with --gpu
of the device's own copies (bytes read and written). `ratio_peer` and
`ratio_lazy_off` are how many times faster than llama.cpp's best and than our own lazy-off. `ratio_peer_limit` is what
`ratio_peer` would be if KV were read at the whole bandwidth, and the rest took what it takes with 16 tokens (`ms_base`: weights
above all): where it is under a target, attention alone can't reach that. `ratio_lazy_off_limit` is what `ratio_lazy_off` would
be if both read KV so. Beside it stands what Python adds to a token that `Llama.generate` gives.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from engines import KV_TYPES, Engine, LlamaCppEngine, LlamaCppModel, Prompt, QcacheEngine
from gpu_memory import free_gpu_bytes, measure_copy_bandwidth
from machine import facts, write_result
from make_model import PRESETS, TYPES, make_model
from python_overhead import measure_python_overhead
from read_bandwidth import measure_read_bandwidth
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ggml_qcache.errors import QCacheError
from ggml_qcache.native import Model
from ggml_qcache_convert import leaders_of

LAZY = ("none", "visual", "global")
LLAMA_CPP_SETTINGS = ((False, "f16", "f16"), (True, "f16", "f16"), (False, "q8_0", "f16"), (True, "q8_0", "q8_0"))
BASE_CONTEXT = 16  # what is left of a step without attention
WARMUP = 3
TRIAL_STEPS = 5  # of each llama.cpp setting, to find those that may be the peer
N_PEERS = 2  # of them that take part
NMSE_MAX = 5e-3  # of logits, llama.cpp with f16 against ours without lazy layers; both round activations to eight bits


@dataclass
class Results:
    """What the JSON file holds beside commit, machine and command."""

    bandwidth: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    prefill: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)


# at module level: llama.cpp keeps the pointer for as long as the process lives
_QUIET = llama_cpp.llama_log_callback(lambda level, text, data: None)


def three_quarters_lazy(n_layer: int) -> list[int]:
    """Leaders of all layers where each full layer leads the three after it."""
    return leaders_of([layer for layer in range(n_layer) if layer % 4 != 0], n_layer)


def make_prompt(n_tokens: int, n_vocab: int, seed: int) -> Prompt:
    """Random tokens, 95 % of them standing for images: 32 of text, then 608 of an image, over and over."""
    tokens = np.random.default_rng(seed).integers(300, n_vocab, n_tokens).astype(np.int32)
    return Prompt(tokens, np.arange(n_tokens) % 640 >= 32)


def check(theirs: np.ndarray, ours: np.ndarray) -> float:
    """NMSE of our logits; raises RuntimeError when they aren't the peer's."""
    nmse = float(np.mean((theirs - ours) ** 2) / np.mean(theirs**2))
    if not nmse <= NMSE_MAX:
        raise RuntimeError(f"logits differ from llama.cpp's: NMSE {nmse:.2e}, at most {NMSE_MAX:.0e}")
    return nmse


def time_steps(
    engines: Sequence[Engine], n_tokens: int, n_seq: int, n_steps: int, n_vocab: int, seed: int, advance: Callable[[], object]
) -> list[tuple[np.ndarray, int]]:
    """Steps of several engines in turns, the last one completing a context of ``n_tokens``.

    Returns:
        For each engine the seconds of its steps, and the KV bytes that the last one read.
    """
    rng = np.random.default_rng(seed)
    n_total = WARMUP + n_steps
    sessions = []
    try:
        for engine in engines:
            sessions.append(engine.session(n_tokens - n_total, n_seq, n_total))
        seconds = np.empty((len(engines), n_total))
        for step in range(n_total):
            tokens = rng.integers(300, n_vocab, n_seq).astype(np.int32)
            for index in rng.permutation(len(engines)):
                seconds[index, step] = sessions[index].step(tokens)
            advance()
        return [(seconds[index, WARMUP:], session.kv_bytes()) for index, session in enumerate(sessions)]
    finally:
        for session in sessions:
            session.close()


def make_row(
    engine: Engine, context: int, n_seq: int, seconds: np.ndarray, kv_bytes: int, base: tuple[float, int], bandwidth: float
) -> dict[str, Any]:
    """One measurement; ratios come when its neighbours are known."""
    low, median, high = np.percentile(1000 * seconds, [25, 50, 75])
    base_ms, base_bytes = base
    gbps = (kv_bytes - base_bytes) / (median - base_ms) / 1e6 if median > base_ms else None
    return {
        "method": engine.name,
        "setting": engine.setting,
        "context": context,
        "n_seq": n_seq,
        "lazy": engine.lazy,
        "kv": engine.kv,
        "ms_per_step": float(median),
        "ms_iqr": float(high - low),
        "n_steps": len(seconds),
        "ms_base": base_ms,
        "tokens_per_s": float(n_seq / median * 1000),
        "kv_bytes": kv_bytes,
        "kv_gbps": gbps,
        "bandwidth_share": None if gbps is None else gbps * 1e9 / bandwidth,
        "ratio_peer": None,
        "ratio_peer_limit": None,
        "ms_kv_limit": 1000 * kv_bytes / bandwidth,
        "ratio_lazy_off": None,
        "ratio_lazy_off_limit": None,
    }


def limit_ms(row: dict[str, Any]) -> float:
    """What a step would take if KV were read at the whole bandwidth."""
    limit: float = row["ms_base"] + row["ms_kv_limit"]
    return limit


def free_bytes() -> int:
    """Memory that can still be taken, file caches included where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class Benchmark:
    """The engines of one model, and what has been measured with them."""

    def __init__(self, args: argparse.Namespace, path: Path, progress: Progress) -> None:
        start = time.perf_counter()
        self.llama_model = LlamaCppModel(path, 999 if args.gpu else 0)
        loaded = time.perf_counter()
        self.model = Model(path, n_gpu_layers=-1 if args.gpu else 0)
        self.load = {"llama.cpp": loaded - start, "ggml-qcache": time.perf_counter() - loaded}
        self.args, self.progress, self.n_vocab = args, progress, self.model.info.n_vocab
        leaders = three_quarters_lazy(self.model.info.n_layer)
        self.peers = [LlamaCppEngine(self.llama_model, *setting, args.threads) for setting in LLAMA_CPP_SETTINGS]
        self.ours = [QcacheEngine(self.model, lazy, leaders, kv, args.threads) for kv in args.kv for lazy in args.lazy]
        self.results = Results(measure_copy_bandwidth() if args.gpu else measure_read_bandwidth(args.threads))
        info = self.model.info
        self.full_bytes_per_token = 4 * info.n_layer * info.n_head_kv * info.head_dim
        self.bases: dict[tuple[str, int], tuple[float, int]] = {}
        self.nmse = float("nan")

    def close(self) -> None:
        """Frees both models."""
        self.model.close()
        self.llama_model.close()

    def run(self) -> None:
        """Every context, every number of sequences."""
        contexts = sorted(set(self.args.contexts))
        per_case = len(self.peers) * (WARMUP + TRIAL_STEPS) + WARMUP + self.args.steps
        n_base = len(self.args.seqs) * (WARMUP + self.args.steps)
        task = self.progress.add_task("steps", total=per_case * len(contexts) * len(self.args.seqs) + n_base)

        def advance(n: int = 1) -> None:
            self.progress.update(task, advance=n)

        engines = [*self.peers, *self.ours]
        n_base_steps = WARMUP + self.args.steps
        self._prefill(engines, BASE_CONTEXT, keep=False)
        for n_seq in self.args.seqs:
            timed = time_steps(engines, BASE_CONTEXT + n_base_steps, n_seq, self.args.steps, self.n_vocab, n_seq, advance)
            for engine, (seconds, kv_bytes) in zip(engines, timed, strict=True):
                self.bases[engine.setting, n_seq] = float(1000 * np.median(seconds)), kv_bytes
        n_prefilled = 0
        for context in contexts:
            n_prompt = min(context - n_base_steps, self.args.prefill)
            if n_prompt > n_prefilled:
                self._prefill(engines, n_prompt, keep=True)
                n_prefilled = n_prompt
            for n_seq in self.args.seqs:
                needed = self._bytes_needed(context, n_seq)
                if needed > 0.9 * (free_gpu_bytes() if self.args.gpu else free_bytes()):
                    self.results.skipped.append({"context": context, "n_seq": n_seq, "bytes": needed})
                    advance(per_case)
                else:
                    self._case(context, n_seq, advance)

    def _prefill(self, engines: Sequence[Engine], n_tokens: int, keep: bool) -> None:
        """Prefills every engine, compares logits, and notes the time where it is one to keep."""
        prompt = make_prompt(n_tokens, self.n_vocab, self.args.seed)
        logits = {}
        task = self.progress.add_task(f"prefill of {n_tokens} tokens", total=len(engines))
        for engine in engines:
            seconds, logits[engine.setting] = engine.prefill(prompt)
            self.progress.update(task, advance=1)
            if keep:
                self.results.prefill.append(
                    {
                        "method": engine.name, "setting": engine.setting, "lazy": engine.lazy, "n_tokens": n_tokens,
                        "seconds": seconds, "tokens_per_s": n_tokens / seconds,
                    }
                )  # fmt: skip
        off = next((engine.setting for engine in self.ours if engine.lazy == "none"), None)
        if off is not None:
            self.nmse = check(logits[self.peers[0].setting], logits[off])

    def _bytes_needed(self, context: int, n_seq: int) -> int:
        """The peers and ours side by side, and the state that one of them is filled from."""
        # of a lazy one 5/8 of a full cache, and K of text
        shares = [KV_TYPES[engine.kv] / 2 * (1.0 if engine.lazy == "none" else 0.65) for engine in self.ours]
        most = max(sum(shares[: i + 1]) + share for i, share in enumerate(shares))
        return int((N_PEERS + most) * self.full_bytes_per_token * context * n_seq)

    def _case(self, context: int, n_seq: int, advance: Callable[[], object]) -> None:
        args = self.args

        def row(engine: Engine, timed: tuple[np.ndarray, int]) -> dict[str, Any]:
            return make_row(engine, context, n_seq, *timed, self.bases[engine.setting, n_seq], self.results.bandwidth)

        trials = []
        for peer in self.peers:
            (timed,) = time_steps([peer], context, n_seq, TRIAL_STEPS, self.n_vocab, args.seed, advance)
            trials.append(row(peer, timed))
        by_time = sorted(range(len(trials)), key=lambda index: trials[index]["ms_per_step"])
        engines = [*(self.peers[index] for index in by_time[:N_PEERS]), *self.ours]
        timed = time_steps(engines, context, n_seq, args.steps, self.n_vocab, args.seed, advance)
        rows = [row(engine, one) for engine, one in zip(engines, timed, strict=True)]
        peers = sorted(rows[:N_PEERS], key=lambda one: one["ms_per_step"])
        rows = [peers[0], *rows[N_PEERS:]]
        others = [*peers[1:], *(trials[index] for index in by_time[N_PEERS:])]
        off = {one["kv"]: one for one in rows if one["lazy"] == "none"}
        for one in [*rows, *others]:
            one["peer"] = peers[0]["setting"]
            one["ratio_peer"] = peers[0]["ms_per_step"] / one["ms_per_step"]
            one["ratio_peer_limit"] = peers[0]["ms_per_step"] / limit_ms(one)
            if one["lazy"] is not None and one["kv"] in off:
                one["ratio_lazy_off"] = off[one["kv"]]["ms_per_step"] / one["ms_per_step"]
                one["ratio_lazy_off_limit"] = limit_ms(off[one["kv"]]) / limit_ms(one)
        self.results.rows += [*rows, *others]


def decode_table(rows: Iterable[dict[str, Any]], bandwidth: float) -> Table:
    """The measurements for the terminal."""
    table = Table(title=f"decode (memory is read at {bandwidth / 1e9:.1f} GB/s)")
    for name in ("context", "seqs", "method", "ms/step", "IQR", "tok/s", "KV MB", "KV GB/s", "share", "x peer", "limit", "x lazy off", "limit"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)

    def shown(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    for row in rows:
        share = row["bandwidth_share"]
        table.add_row(
            str(row["context"]), str(row["n_seq"]), f"{row['method']}, {row['setting']}", f"{row['ms_per_step']:.1f}",
            f"{row['ms_iqr']:.1f}", f"{row['tokens_per_s']:.1f}", f"{row['kv_bytes'] / 1e6:.0f}", shown(row["kv_gbps"], 1),
            "" if share is None else f"{share:.0%}", shown(row["ratio_peer"], 2), shown(row["ratio_peer_limit"], 2),
            shown(row["ratio_lazy_off"], 2), shown(row["ratio_lazy_off_limit"], 2),
        )  # fmt: skip
    return table


def prefill_table(rows: Iterable[dict[str, Any]]) -> Table:
    """The prefills for the terminal."""
    table = Table("tokens", "method", "tokens/s", title="prefill")
    for row in rows:
        table.add_row(str(row["n_tokens"]), f"{row['method']}, {row['setting']}", f"{row['tokens_per_s']:.1f}")
    return table


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Names with commas between them."""

    def names(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return text.split(",")

    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time decode steps of ggml-qcache against llama.cpp at its best setting.")
    parser.add_argument("--preset", choices=list(PRESETS), default="llava-1.5-7b", help="shapes (default: llava-1.5-7b)")
    parser.add_argument("--layers", type=int, default=8, metavar="N", help="layers of the model (default: 8)")
    parser.add_argument("--type", choices=list(TYPES), default="q4_0", help="type of the weights (default: q4_0)")
    parser.add_argument("--model", type=Path, metavar="FILE", help="GGUF to use instead of a random one")
    parser.add_argument(
        "--model-dir", type=Path, default=Path("build/bench-models"), metavar="DIR", help="where random ones are kept"
    )
    parser.add_argument("--contexts", type=_numbers, default=[3072], metavar="N,N", help="tokens in each sequence (default: 3072)")
    parser.add_argument("--seqs", type=_numbers, default=[1, 8], metavar="N,N", help="sequences in a batch (default: 1,8)")
    parser.add_argument("--lazy", type=_some_of(LAZY), default=list(LAZY), metavar="MODES", help="of none,visual,global (default: all)")
    parser.add_argument(
        "--kv", type=_some_of(KV_TYPES), default=["f16"], metavar="TYPES", help="of our K and V: of f16,q8_0,q4_0 (default: f16)"
    )
    parser.add_argument("--gpu", action="store_true", help="all layers of both engines on the first GPU")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="threads of both (default: all cores)")
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="timed steps of each method (default: 12)")
    parser.add_argument(
        "--prefill", type=int, default=3072, metavar="N", help="tokens prefilled and timed; longer contexts repeat them (default: 3072)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and tokens (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; the process's own by default.

    Returns:
        Exit status: 0 measured, 1 failed.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    shortest = WARMUP + max(args.steps, TRIAL_STEPS) + BASE_CONTEXT
    if args.steps < 1 or args.threads < 1 or min(args.seqs) < 1 or min(args.contexts) < shortest or args.prefill < BASE_CONTEXT:
        parser.error(f"contexts of {shortest} tokens or more, and steps, threads and sequences of 1 or more are needed")
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a log has room
    llama_cpp.llama_log_set(_QUIET, None)
    try:
        path = args.model
        if path is None:
            path = args.model_dir / f"{args.preset}-{args.layers}-{args.type}-{args.seed}.gguf"
            args.model_dir.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                make_model(args.preset, path, n_layer=args.layers, weight_type=args.type, seed=args.seed, progress=console.is_terminal)
        found = facts("decode", argv)
        with Progress(console=console, transient=True) as progress:
            benchmark = Benchmark(args, path, progress)
            try:
                benchmark.run()
            finally:
                benchmark.close()
        python_seconds = measure_python_overhead(path, args.threads, -1 if args.gpu else 0)
    except (ValueError, OSError, RuntimeError, QCacheError) as error:
        print(f"bench_decode: error: {error}", file=sys.stderr)
        return 1
    results = benchmark.results
    console.print(decode_table(results.rows, results.bandwidth))
    console.print(prefill_table(results.prefill))
    console.print(f"loaded in seconds: {', '.join(f'{name} {seconds:.1f}' for name, seconds in benchmark.load.items())}")
    console.print(f"Python adds {1e6 * python_seconds:.0f} us to a generated token")
    for case in results.skipped:
        console.print(f"skipped: {case['n_seq']} sequences of {case['context']} need {case['bytes'] / 1e9:.1f} GB")
    if args.json is not None:
        content = {
            **found,
            "model": {"file": path.name, **benchmark.model.info._asdict()},
            "threads": args.threads,
            "kernel": benchmark.ours[0].kernel,
            "gpu": benchmark.model.info.gpu,
            "read_bandwidth": results.bandwidth,
            "nmse": benchmark.nmse,
            "load_seconds": benchmark.load,
            "python_seconds_per_token": python_seconds,
            "prefill": results.prefill,
            "rows": results.rows,
            "skipped": results.skipped,
        }
        write_result(content, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
