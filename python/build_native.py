"""Writes the C source of the extension module ``ggml_qcache._native`` (cffi, API mode).

CMake runs it at build time. Every declaration comes from ``qcache.h`` itself, so the module can't disagree with the
header; what cffi gets wrong about a layout or a signature fails when the C compiler sees both. The functions of
``per_token.h`` are added.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import cffi

MODULE = "ggml_qcache._native"

# of per_token.h
PER_TOKEN = """
struct candidate { int32_t id; float logit; float p; };
struct candidates { struct candidate * data; size_t size; int64_t selected; bool sorted; };
enum qcache_status next_token(qcache_context_t * ctx, int32_t token, int32_t n_past, float * logits, size_t row, size_t n_vocab);
int32_t sample_token(uintptr_t apply, uintptr_t accept, uintptr_t sampler, struct candidates * out, const float * logits, size_t row, int32_t n_vocab);
struct generation {
    uintptr_t apply, accept, sampler; struct candidates * candidates; float * logits; int32_t n_vocab; int32_t * ids;
    enum qcache_status status;
};
int32_t generate_token(qcache_context_t * ctx, struct generation * g, int32_t token, int32_t n_past);
"""


def declarations(header: str) -> str:
    """Reduces ``qcache.h`` to the plain C declarations that cffi reads.

    Args:
        header: Text of the header.

    Returns:
        The header as a C compiler off Windows would see it: comments, directives and ``QCACHE_API`` gone.

    Raises:
        ValueError: A directive that the header isn't known to use.
    """
    header = re.sub(r"/\*.*?\*/|//[^\n]*", "", header, flags=re.S).replace("\\\n", " ")
    active = [True]  # one entry per open conditional; no macro is defined
    lines = []
    for line in header.splitlines():
        match = re.match(r"\s*#\s*(\w+)", line)
        directive = match[1] if match else None
        if directive == "ifdef":
            active.append(False)
        elif directive == "ifndef":
            active.append(active[-1])
        elif directive == "else":
            active[-1] = active[-2] and not active[-1]
        elif directive == "endif":
            active.pop()
        elif directive is None:
            if active[-1]:
                lines.append(line)
        elif directive not in ("include", "define"):
            raise ValueError(f"unexpected preprocessor directive in the header: {line.strip()!r}")
    return re.sub(r"\bQCACHE_API\b", "", "\n".join(lines))


def main() -> None:
    """Reads the header and writes the C file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--header", type=Path, required=True, help="qcache.h")
    parser.add_argument("--out", type=Path, required=True, help="C file to write")
    args = parser.parse_args()

    ffi = cffi.FFI()
    ffi.cdef(declarations(args.header.read_text(encoding="utf-8")) + PER_TOKEN)
    per_token = Path(__file__).with_name("per_token.h").read_text(encoding="utf-8")
    ffi.set_source(MODULE, f'#include "{args.header.name}"\n{per_token}')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    ffi.emit_c_code(str(args.out))


if __name__ == "__main__":
    main()
