#!/usr/bin/env bash
# Builds for the NVIDIA GPU of this machine, checks, times, and prints a short table last. For a machine without package
# registries: what Python lacks there is taken from an archive and wheels that travel with the checkout.
#
#   bench/gpu.sh [build] [check] [time]      default: all three
#
# DEVICE  folder with llama_cpp_python-*.tar.xz (a CUDA build of llama-cpp-python, unpacked) and *.whl: diskcache, cffi,
#         pycparser, gguf (default: .device)
# OUT     folder for JSON and logs (default: bench/results)
# LAYERS  layers of the 7B-shaped model that is timed (default: 8)
# SEQS    sequences in a batch (default: 1,16,32)
set -euo pipefail
cd "$(dirname "$0")/.."

DEVICE=${DEVICE:-.device}
OUT=${OUT:-bench/results}
LAYERS=${LAYERS:-8}
SEQS=${SEQS:-1,16,32}
SITE=${SITE:-/tmp/qcache-site}
PYTHON=${PYTHON:-python3}
STEPS=("${@:-all}")
mkdir -p "$OUT"
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# libggml-cuda.so finds the CUDA runtime and cuBLAS through this
for folder in /usr/local/cuda-13.0/lib64 /usr/local/cuda/lib64; do
    [ -d "$folder" ] && export LD_LIBRARY_PATH="$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
done
status=0
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader

wanted() { [[ " ${STEPS[*]} " == *" $1 "* || " ${STEPS[*]} " == *" all "* ]]; }

if wanted build; then
    if compgen -G "$DEVICE/llama_cpp_python-*.tar.xz" >/dev/null && [ ! -d "$SITE/llama_cpp" ]; then
        mkdir -p "$SITE"
        tar xJf "$DEVICE"/llama_cpp_python-*.tar.xz -C "$SITE"
    fi
    if compgen -G "$DEVICE/*.whl" >/dev/null; then
        "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$SITE" "$DEVICE"/*.whl
    fi
    start=$SECONDS
    export CUDAFLAGS="${CUDAFLAGS:---split-compile=0}" # dozens of kernels in a file
    "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --upgrade --target "$SITE" \
        --config-settings=build-dir=build/gpu --config-settings=cmake.define.QCACHE_BUILD_TESTS=ON .
    echo "built in $((SECONDS - start)) s"
    "$PYTHON" -c "from llama_cpp import llama_cpp as c; assert c.llama_supports_gpu_offload(), 'this llama.cpp has no GPU'"
fi

if wanted check; then
    # the operation in the GPU's own memory, against NumPy
    export QCACHE_TEST_BUILD=build/gpu
    QCACHE_OP_DEVICE=1 timeout 120 "$PYTHON" -m pytest -q --tb=short tests/test_gpu_op.py 2>&1 | tee "$OUT/gpu-op.log" | tail -n 30 || status=1
    # logits, sequences, states, partial offload and answers about images, against the CPU path
    NVIDIA_TF32_OVERRIDE=0 timeout 240 "$PYTHON" -m pytest -q --tb=short tests/gpu_backend.py 2>&1 | tee "$OUT/gpu-check.log" | tail -n 60 || status=1
    if command -v compute-sanitizer >/dev/null; then
        QCACHE_OP_DEVICE=1 timeout 180 compute-sanitizer --error-exitcode 7 --target-processes all "$PYTHON" -m pytest -q \
            tests/test_gpu_op.py -k "test_types_and_modes or test_v_" >"$OUT/gpu-sanitizer.log" 2>&1 &&
            echo "compute-sanitizer: no error" || echo "compute-sanitizer: see $OUT/gpu-sanitizer.log"
    fi
fi

if wanted time; then
    shopt -s nullglob
    for preset in llava-1.5-7b llava-next-mistral-7b; do
        "$PYTHON" bench/bench_decode.py --gpu --preset "$preset" --layers "$LAYERS" --type q4_0 --contexts 2048 --seqs "$SEQS" \
            --prefill 2048 --steps 30 --json "$OUT/gpu-$preset.json" >"$OUT/gpu-$preset.log" 2>&1 || tail -n 5 "$OUT/gpu-$preset.log"
    done
    "$PYTHON" bench/bench_decode.py --gpu --preset llava-1.5-7b --layers "$LAYERS" --type q4_0 --contexts 16384 --seqs 1 --steps 30 \
        --json "$OUT/gpu-long.json" >"$OUT/gpu-long.log" 2>&1 || tail -n 5 "$OUT/gpu-long.log"
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
