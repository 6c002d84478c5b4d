#!/usr/bin/env bash
# Builds for the NVIDIA GPU of this machine, checks, times, and prints a short table last. For a machine without package
# registries: what Python lacks there travels with the checkout in a folder that `pack` fills beforehand.
#
#   ARCHIVE=FILE bench/gpu.sh pack                                  where there are registries
#   bench/gpu.sh [build] [op] [time] [model] [sanitize]             on the GPU machine; default: all, as LIMIT allows
#
# build     the library and its tests
# op        the operation in the GPU's own memory, against NumPy
# time      decode and prefill against llama.cpp
# model     logits, sequences, states, partial offload and answers about images, against the CPU path
# sanitize  compute-sanitizer on the operation's tests
#
# ARCHIVE  llama_cpp_python-*.tar.xz, a CUDA build of llama-cpp-python, unpacked
# DEVICE   folder of that and of wheels (default: .device)
# OUT      folder for JSON and logs (default: bench/results)
# LIMIT    seconds for everything (default: 570); a step gets what is left
# LAYERS   layers of the 7B-shaped model that is timed (default: 8)
# SEQS     sequences in a batch (default: 1,16,32)
#
# QCACHE_CUDA_STREAM=own gives our kernels a stream beside ggml's, =ggml refuses that; `time` measures both.
set -euo pipefail
cd "$(dirname "$0")/.."

DEVICE=${DEVICE:-.device}
OUT=${OUT:-bench/results}
LIMIT=${LIMIT:-570}
LAYERS=${LAYERS:-8}
SEQS=${SEQS:-1,16,32}
SITE=${SITE:-/tmp/qcache-site}
PYTHON=${PYTHON:-python3}
STEPS=" ${*:-build op time model sanitize} "
status=0

wanted() { [[ "$STEPS" == *" $1 "* ]]; }

# a command in what is left of the time
limited() {
    local left=$((LIMIT - SECONDS))
    if [ "$left" -lt 5 ]; then
        echo "no time left for: $*" >&2
        return 124
    fi
    timeout --kill-after=5 "$left" "$@"
}

if wanted pack; then
    mkdir -p "$DEVICE"
    cp "${ARCHIVE:?the archive to pack}" "$DEVICE/"
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version "${PYTHON_THERE:-3.12}" --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
        --dest "$DEVICE" diskcache cffi pycparser gguf
    du -h "$DEVICE"/*
    exit
fi

mkdir -p "$OUT"
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 QCACHE_TEST_BUILD=build/gpu
# libggml-cuda.so finds the CUDA runtime and cuBLAS through this
for folder in /usr/local/cuda-13.0/lib64 /usr/local/cuda/lib64; do
    [ -d "$folder" ] && export LD_LIBRARY_PATH="$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
done
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader

if wanted build; then
    if compgen -G "$DEVICE/llama_cpp_python-*.tar.xz" >/dev/null && [ ! -d "$SITE/llama_cpp" ]; then
        mkdir -p "$SITE"
        tar xJf "$DEVICE"/llama_cpp_python-*.tar.xz -C "$SITE"
    fi
    if compgen -G "$DEVICE/*.whl" >/dev/null; then
        "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$SITE" "$DEVICE"/*.whl
    fi
    export CUDAFLAGS="${CUDAFLAGS:---split-compile=0}" # dozens of kernels in a file
    limited "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --upgrade --target "$SITE" \
        --config-settings=build-dir=build/gpu --config-settings=cmake.define.QCACHE_BUILD_TESTS=ON .
    "$PYTHON" -c "from llama_cpp import llama_cpp as c; assert c.llama_supports_gpu_offload(), 'this llama.cpp has no GPU'"
    echo "built after $SECONDS s"
fi

if wanted op; then
    QCACHE_OP_DEVICE=1 limited "$PYTHON" -m pytest -q --tb=short tests/test_gpu_op.py 2>&1 | tee "$OUT/gpu-op.log" | tail -n 30 || status=1
    echo "op checked after $SECONDS s"
fi

if wanted time; then
    run() {
        local name=$1
        shift
        limited "$PYTHON" bench/bench_decode.py --gpu --layers "$LAYERS" --type q4_0 --steps 30 --json "$OUT/gpu-$name.json" "$@" >"$OUT/gpu-time.log" 2>&1 ||
            { status=1; tail -n 5 "$OUT/gpu-time.log"; }
        echo "$name timed after $SECONDS s"
    }
    run llava-1.5-7b --preset llava-1.5-7b --contexts 2048 --seqs "$SEQS" --prefill 2048
    run long --preset llava-1.5-7b --contexts 16384 --seqs 1
    run llava-next-mistral-7b --preset llava-next-mistral-7b --contexts 2048 --seqs "$SEQS" --prefill 2048
    for stream in ggml own; do
        QCACHE_CUDA_STREAM=$stream run "$stream-stream" --preset llava-1.5-7b --contexts 2048 --seqs 1 --prefill 2048
    done
fi

if wanted model; then
    NVIDIA_TF32_OVERRIDE=0 limited "$PYTHON" -m pytest -q --tb=short tests/gpu_backend.py 2>&1 | tee "$OUT/gpu-model.log" | tail -n 60 || status=1
    echo "model checked after $SECONDS s"
fi

if wanted sanitize && command -v compute-sanitizer >/dev/null; then
    QCACHE_OP_DEVICE=1 limited compute-sanitizer --error-exitcode 7 --target-processes all "$PYTHON" -m pytest -q tests/test_gpu_op.py \
        -k "test_types_and_modes or test_v_" >"$OUT/gpu-sanitizer.log" 2>&1 && echo "compute-sanitizer: no error" || {
        status=1
        echo "compute-sanitizer: see $OUT/gpu-sanitizer.log"
    }
fi

if wanted time; then
    shopt -s nullglob
    "$PYTHON" - "$OUT"/gpu-*.json <<'PY'
import json, sys
for name in sys.argv[1:]:
    data = json.load(open(name))
    print(f"{name}: device copies at {data['read_bandwidth'] / 1e9:.0f} GB/s")
    for row in data["prefill"]:
        print(f"  prefill {row['n_tokens']:>6} {row['method']:>12} {row['setting']:<28} {row['tokens_per_s']:>9.0f} tokens/s")
    for row in data["rows"]:
        ratio = "" if row["ratio_lazy_off"] is None else f"{row['ratio_lazy_off']:.2f}x lazy off"
        print(f"  decode {row['context']:>6} x {row['n_seq']:<3} {row['method']:>12} {row['setting']:<28} {row['ms_per_step']:>8.2f} ms "
              f"{row['ratio_peer']:.2f}x peer {ratio}")
PY
fi
exit "$status"
