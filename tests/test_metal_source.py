"""The Metal source, where there is no Metal: what the language forbids, address spaces, limits, and whether races are found.

The text that is checked is the one that is embedded in the library (ggml_qcache/metal/embed.cmake). That it computes what it should is
checked by test_gpu_op.py, which runs it.
"""

import ctypes
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import op_harness
from op_harness import F16, Q4_0, Q8_0, Case, HarnessError, Sequence, Shape
from test_op import DIALOGUE, SEED, case_of

ROOT = Path(__file__).parents[1]
SHIM = ROOT / "tests" / "native" / "metal_shim"
CLANG = shutil.which("clang-14") or shutil.which("clang")
FUNCTIONS = [
    "qcache_append", "qcache_merge", "qcache_v_limits", *(f"qcache_decode_{n}" for n in (1, 2, 4, 8)), *(f"qcache_prefill_{n}" for n in (32, 64, 80, 96, 128, 256)),
]
APPEND_ARGS_BYTES, ATTN_ARGS_BYTES = 104, 208  # static_assert in attn-args.h

SPACES = ("device", "threadgroup", "constant", "thread")
ATTRIBUTES = {
    "p": "buffer(0)",
    "memory": "threadgroup(0)",
    "group": "threadgroup_position_in_grid",
    "lane": "thread_index_in_simdgroup",
    "warp": "simdgroup_index_in_threadgroup",
}


def text_path() -> Path:
    build = Path(os.environ.get("QCACHE_TEST_BUILD", ROOT / "build"))
    found = sorted(build.rglob("qcache.metal"), key=lambda p: p.stat().st_mtime)
    assert found, f"no qcache.metal under {build}"
    return found[-1]


@pytest.fixture(scope="module")
def text() -> str:
    return text_path().read_text(encoding="ascii")


def for_metal(text: str) -> str:
    """The lines that Metal's compiler keeps, without comments; as many lines as before."""
    kept, stack = [], []  # of each #if: whether a branch was taken, whether this one is
    for line in text.splitlines():
        line = re.sub(r"//.*", "", line).rstrip()
        condition = re.fullmatch(r"#(el)?if (!?)defined\((__CUDACC__|__METAL_VERSION__)\)", line)
        skipped = not all(taken for _, taken in stack)  # conditions in there are indented
        assert condition or skipped or not re.match(r"#\s*(el)?if", line), f"a condition that this test does not know: {line}"
        if condition:
            holds = (condition[3] == "__METAL_VERSION__") != bool(condition[2])
            if condition[1]:
                stack[-1] = [stack[-1][0] or holds, holds and not stack[-1][0]]
            else:
                stack.append([holds, holds])
            line = ""
        elif line == "#else":
            stack[-1] = [True, not stack[-1][0]]
            line = ""
        elif line == "#endif":
            stack.pop()
            line = ""
        kept.append(line if all(taken for _, taken in stack) else "")
    assert not stack
    return "\n".join(kept)


@pytest.fixture(scope="module")
def source(text: str) -> str:
    return for_metal(text)


#
# the text
#


def test_is_self_contained(source: str) -> None:
    included = re.findall(r"#\s*include\s+(.*)", source)
    assert set(included) == {"<metal_stdlib>", "<metal_simdgroup>", "<metal_simdgroup_matrix>"}
    assert "#pragma once" not in source


def test_is_what_is_embedded(text: str) -> None:
    array = text_path().with_name("qcache-metal-source.cpp").read_text()
    numbers = bytes(int(n, 16) for n in re.findall(r"0x([0-9a-f]{2}),", array))
    assert numbers.decode() == text
    assert f"qcache_metal_source_size = {len(text)};" in array and re.search(r",\s*0 };", array)


FORBIDDEN = {
    "double": r"\b(long\s+)?double\b",
    "a double's literal": r"(?<![\w.])(\d+\.\d*|\.\d+|\d+[eE][+-]?\d+)([eE][+-]?\d+)?(?![\w.])",
    "a lambda": r"[=(,{;]\s*\[[^\[\]]*\]\s*(\([^)]*\))?\s*(mutable\s*)?(->[^{]*)?\{",
    "if constexpr": r"\bif\s+constexpr\b",
    "C++ that Metal lacks": r"\b(goto|virtual|new|delete|throw|try|catch|dynamic_cast|typeid|thread_local|asm|std|malloc|register|long long)\b",
    "auto": r"\bauto\b",  # C++14, but it hides an address space
    "atomics": r"\batomic",
    "a static variable": r"\bstatic\b",
    "layout of a matrix": r"thread_elements",
    "unbounded threads": r"\bthreads_per",
    "fast math": r"\bfast::",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_forbidden(source: str, what: str) -> None:
    found = re.search(FORBIDDEN[what], source)
    assert not found, f"{what}: {source[max(0, found.start() - 80) : found.end() + 80]!r}"


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("double", "double x;"),
        ("a double's literal", "x = 0.5;"),
        ("a double's literal", "x = 1e-3 * y;"),
        ("a lambda", "const f = [&](int i) { return i; };"),
        ("a lambda", "call([] { return 1; })"),
        ("if constexpr", "if constexpr (A) {"),
        ("C++ that Metal lacks", "std::max(a, b)"),
        ("atomics", "atomic_ulong x;"),
        ("auto", "auto x = y;"),
    ],
)
def test_forbidden_is_found(what: str, code: str) -> None:
    assert re.search(FORBIDDEN[what], code)


TYPE = r"(?:void|bool|char|short|int|uint|ulong|ushort|float|half|u?int\d+_t|uint[234]|T|V|A|qg_\w+|simdgroup_\w+)"


def bare_pointers(source: str) -> list[str]:
    """Pointers and references whose declaration, or cast, names no address space."""
    before = r"((?:\b(?:device|threadgroup|constant|thread|const|QG_GLOBAL|QG_SHARED|QG_CONSTANT|QG_LOCAL)\b\s+)*)"
    bare = []
    for found in re.finditer(before + rf"\b{TYPE}\b(?:\s+const)?\s*[*&](?!&)", source):
        if not re.search(r"device|threadgroup|constant|thread|QG_", found[1]):
            bare.append(source[max(0, found.start() - 30) : found.end() + 30])
    return bare


def test_every_pointer_names_its_address_space(source: str) -> None:
    assert len(re.findall(rf"\b{TYPE}\b\s*[*&]", source)) > 60
    assert bare_pointers(source) == []
    for code in ("void f(const float * x) {", "f((uint8_t *) row)", "qg_row & r = x;"):
        assert bare_pointers(code)


def test_program_scope_variables_are_constant(source: str) -> None:
    """At depth 0 there are functions, types and function constants; everything else lives in a function."""
    depth, outside = 0, ""
    for character in re.sub(r"#.*(\\\n.*)*", "", source):
        depth += (character == "{") - (character == "}")
        outside += character if depth == 0 else ""
    variables = [s for s in re.findall(r"[^;{}]+;", outside) if "(" not in re.sub(r"\[\[.*?\]\]", "", s)]
    variables = [v.strip() for v in variables if not re.search(r"\b(using|typedef|struct|enum)\b", v)]
    variables = [re.sub(r"^}\s*", "", v) for v in variables if v not in (";", "};")]
    assert len(variables) == 4 and all(re.fullmatch(r"constant int \w+ \[\[function_constant\(\d\)\]\];", v) for v in variables), variables


def test_no_recursion(source: str) -> None:
    bodies = {}
    for found in re.finditer(r"\b(qg_\w+|sync\w*|shuffle_xor)\(([^()]|\([^()]*\))*\)\s*(?:const\s*)?\{", source):
        depth, at = 1, found.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(source[at], 0)
            at += 1
        bodies[found[1]] = bodies.get(found[1], "") + source[found.end() : at]
    assert len(bodies) > 20
    calls = {name: set(re.findall(r"\b(\w+)(?:<\w+>)?\(", body)) & set(bodies) for name, body in bodies.items()}
    reach = {name: set(called) for name, called in calls.items()}
    for _ in bodies:
        for name, called in reach.items():
            reach[name] = called.union(*(reach[other] for other in called))
    assert [name for name, called in reach.items() if name in called] == []


def test_functions_and_their_arguments(source: str) -> None:
    declared = re.findall(r"void (\w+)\(([^{]*)\)\s*(?:\\\s*)?\{", source[source.index("[[kernel") :])
    assert {name for name, _ in declared} == {"qcache_append", "NAME"}
    for name, arguments in declared:
        of_name = dict(re.findall(r"(\w+) \[\[([^]]+)\]\]", arguments))
        assert of_name == {n: a for n, a in ATTRIBUTES.items() if name != "qcache_append" or n != "memory"}
        assert re.search(r"constant qg_\w+_args & p \[\[", arguments)
        for index in re.findall(r"(?:buffer|threadgroup)\((\d+)\)", arguments):
            assert int(index) <= 30
    assert source.count("[[kernel, max_total_threads_per_threadgroup(QG_THREADS)]]") == 2
    assert ["qcache_append", *re.findall(r"QG_METAL_ATTN\((qcache_\w+),", source)] == FUNCTIONS


def test_host_and_source_agree(source: str) -> None:
    header = (ROOT / "ggml_qcache" / "metal" / "metal-kernels.h").read_text()
    names = dict(enumerate(re.search(r"enum qcache_metal_constant \{(.*?)\};", header, re.S)[1].replace(" ", "").split("\n")[1:]))
    indices = {v: int(i) for v, i in re.findall(r"constant int (\w+) \[\[function_constant\((\d+)\)\]\];", source)}
    assert indices == {"qg_type_k": 0, "qg_type_v": 1, "qg_fixed_head_dim": 2, "qg_fixed_score_op": 3}
    expected = ("QCACHE_METAL_TYPE_K", "QCACHE_METAL_TYPE_V", "QCACHE_METAL_HEAD_DIM", "QCACHE_METAL_SCORE_OP", "QCACHE_METAL_N_CONSTANTS")
    assert all(names[i].startswith(name + ",") for i, name in enumerate(expected))
    assert set(re.findall(r'"(qcache_\w+)"', header)) == set(FUNCTIONS)


#
# compilers
#


def check_as_cpp(text: str, folder: Path) -> str:
    """What the C++ compiler has to say of the text as C++14."""
    (folder / "text.metal").write_text(text)
    command = ["cmake", f"-DIN={folder}/text.metal", f"-DOUT={folder}/qcache-emulated.metal", "-P", SHIM.parent / "metal_text.cmake"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    flags = ["-std=c++14", "-fsyntax-only", "-D__METAL_VERSION__=300"]
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow=local", "-Werror", "-Wno-unknown-pragmas"]
    command = [shutil.which("g++"), *flags, *warnings, f"-I{SHIM}", f"-I{folder}", SHIM.parent / "metal_functions.cpp"]
    return subprocess.run(command, capture_output=True, text=True).stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_is_cpp14_without_warnings(text: str, tmp_path: Path) -> None:
    assert check_as_cpp(text, tmp_path) == ""
    assert "17" in check_as_cpp(text.replace("if (type == QG_F16) {\n        const", "if constexpr (QG_F16 == 0) {\n        const"), tmp_path)


def check_address_spaces(text: str, folder: Path) -> str:
    """What clang has to say of the text as OpenCL C++, whose address spaces are Metal's by other names."""
    # a constant needs a value there
    text = re.sub(r"(constant int \w+ \[\[function_constant\(\d\)\]\]);", r"\1 = 0;", text)
    (folder / "text.cl").write_text(text)
    flags = ["-x", "cl", "-cl-std=CLC++2021", "-cl-no-stdinc", "-target", "spir64", "-fsyntax-only", "-D__METAL_VERSION__=300", f"-I{SHIM}"]
    warnings = ["-Wall", "-Wextra", "-Wdouble-promotion", "-Werror", "-Wno-unknown-attributes", "-Wno-unknown-pragmas"]
    return subprocess.run([CLANG, *flags, *warnings, folder / "text.cl"], capture_output=True, text=True).stderr


@pytest.mark.skipif(CLANG is None, reason="no clang")
def test_address_spaces(text: str, tmp_path: Path) -> None:
    assert check_address_spaces(text, tmp_path) == ""


@pytest.mark.skipif(CLANG is None, reason="no clang")
@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        (
            "QG_SHARED float *       weight = (QG_SHARED float *) t.shared();",
            "QG_SHARED float * weight = (QG_GLOBAL float *) p.dst;",
            "cannot initialize",
        ),
        (
            "QG_SHARED float *       weight = (QG_SHARED float *) t.shared();",
            "QG_SHARED float * weight = (QG_SHARED float *) (QG_GLOBAL float *) p.dst;",
            "converts between mismatching address spaces",
        ),
        ("device float * to = (device float *) p.dst", "device float * to = (threadgroup float *) p.dst", "cannot initialize"),
        ("threadgroup float * diagonal  = logits + KEYS;", "device float * diagonal = logits + KEYS;", "cannot initialize"),
        (
            "qg_load8(type, from, token * row_bytes, chunk, raw);",
            "qg_load8(type, (constant const uint8_t *) from, token * row_bytes, chunk, raw);",
            "converts between mismatching address spaces",
        ),
        ("const int ir       = t.block_y();", "const int ir = p.n_head = t.block_y();", "cannot assign to variable 'p' with const-qualified type"),
        ("simdgroup_load(w, weights + 8 * i, 2 * LOGITS);", "simdgroup_load(w, logits + 8 * i, 2 * LOGITS);", "no matching function"),
        ("const float from = qg_finite_max(max[g]);", "const float from = 1.0 * qg_finite_max(max[g]);", "double"),
    ],
)
def test_mixed_address_spaces_are_found(text: str, tmp_path: Path, right: str, wrong: str, message: str) -> None:
    # columns may be aligned otherwise by now
    broken, n = re.subn(r"\s+".join(re.escape(word) for word in right.split()), lambda _: wrong, text)
    assert n >= 1, "this test is out of date"
    assert message in check_address_spaces(broken, tmp_path)


#
# limits and races, where it is run
#


def emulate(entry="qcache_merge", constants=(0, 0, 32, 0), grid=(1, 1, 1), threads=128, shared=64, size=ATTN_ARGS_BYTES) -> str:
    """What is wrong with a dispatch; a right one would read from address 0."""
    args = (ctypes.c_uint8 * 4096)()
    values, sizes = (ctypes.c_int32 * len(constants))(*constants), (ctypes.c_int32 * 3)(*grid)
    return op_harness.library().harness_metal_emulate(entry.encode(), values, len(constants), sizes, threads, shared, args, size).decode()


def test_what_a_dispatch_may_not_ask_for() -> None:
    assert "no function qcache_other" in emulate("qcache_other")
    assert "function constant 3 has no value" in emulate(constants=(0, 0, 32))
    assert f"{ATTN_ARGS_BYTES + 8} bytes of arguments, expected {ATTN_ARGS_BYTES}" in emulate(size=ATTN_ARGS_BYTES + 8)
    assert f"expected {APPEND_ARGS_BYTES}" in emulate("qcache_append", size=8)
    assert "32784 bytes of threadgroup memory" in emulate(shared=32 * 1024 + 16)
    assert "8 bytes of threadgroup memory" in emulate(shared=8)
    assert "100 threads" in emulate(threads=100)
    assert "empty grid" in emulate(grid=(1, 0, 1))


def run(case: Case, **how):
    return case.run("metal", check_blocks=False, **how)


def skip(layers, _):
    layers[1].v_skip = 0.1


LONG = Case(Shape(64, 2, 1, Q8_0, F16, 16), [Sequence("t20 v300 t41", 360, 1)], "global", seed=SEED)  # several spans, two heads at once
CASES = [
    (case_of(Shape(64, 4, 2, F16, Q8_0), "prefill", "visual", True), {}),
    (case_of(Shape(256, 2, 2, Q4_0, F16, 16), "prefill", "off"), {}),
    (LONG, {"score_cache": True, "edit": skip}),
]


def test_every_barrier_is_needed(source: str) -> None:
    """Leaves out each barrier in turn: the checker of races has to find that it is missing."""
    written = [i + 1 for i, line in enumerate(source.splitlines()) if re.search(r"\bt\.sync\w*\(\);", line)]
    lib = op_harness.library()
    for case, how in CASES:
        run(case, **how)
    lines = (ctypes.c_int32 * 100)()
    assert list(lines[: lib.harness_metal_barriers(lines, 100)]) == written, "a barrier that no case comes to"
    assert len(written) >= 15
    try:
        for line in written:
            lib.harness_metal_without_barrier(line)
            with pytest.raises(HarnessError, match="race: byte"):
                for case, how in CASES:
                    run(case, **how)
                print(f"nothing found without the barrier in line {line}: {source.splitlines()[line - 1]}")
    finally:
        lib.harness_metal_without_barrier(0)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_misaligned_loads_are_found(kind: str) -> None:
    def move(layers, _):
        for layer, m in itertools.product(layers, (0, 1)):
            layer.v_offset[m] += 8

    with pytest.raises(HarnessError, match="a misaligned load or store of 16 bytes"):
        run(case_of(Shape(), kind, "off"), edit=move)


def test_rows_that_write_the_same_are_found() -> None:
    def repeat(_, step):
        step.rows[1] = step.rows[0]

    with pytest.raises(HarnessError, match="race: device memory is written by two threads"):
        run(Case(Shape(), [Sequence(DIALOGUE, 90, 4)], "off", seed=SEED), edit=repeat)
