# make demo: everything from a fresh clone to answers about images
# make test: the test suite (also what CI runs), in WORKERS processes

PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
JOBS    := $(shell getconf _NPROCESSORS_ONLN)
WORKERS ?= 2

SOURCES := $(shell find ggml_qcache python convert -type f -not -path '*/__pycache__/*') CMakeLists.txt pyproject.toml README.md LICENSE

.PHONY: demo test test-slow test-asan native-tests clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed-test native-tests
	ctest --test-dir build/tests --output-on-failure --parallel $(JOBS)
	OMP_NUM_THREADS=1 QCACHE_TEST_BUILD=build/tests $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# the suites that take minutes each
test-slow: $(VENV)/.installed-test native-tests
	QCACHE_TEST_BUILD=build/tests $(BIN)/python -m pytest -q -m slow

# native tests under the address and undefined-behaviour sanitizers
test-asan: $(VENV)/.deps
	cmake -S . -B build/asan -DCMAKE_BUILD_TYPE=RelWithDebInfo -DQCACHE_SANITIZE=ON -DQCACHE_BUILD_TESTS=ON -DQCACHE_BUILD_PYTHON=OFF \
	    -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	cmake --build build/asan --parallel $(JOBS)
	ctest --test-dir build/asan --output-on-failure

native-tests: $(VENV)/.deps
	cmake -S . -B build/tests -DQCACHE_BUILD_TESTS=ON -DQCACHE_BUILD_PYTHON=OFF -DPython_EXECUTABLE=$(abspath $(BIN)/python) >build/tests.log 2>&1 || (cat build/tests.log; exit 1)
	cmake --build build/tests --parallel $(JOBS)

# GCC removes the stores of AMX's tile configuration as dead, and the first prompt of a quantised model would meet an illegal
# instruction (llama.cpp #26954)
ifneq ($(shell grep -m 1 -ow amx_int8 /proc/cpuinfo 2>/dev/null),)
AMX_FLAGS := -fno-dse
endif

# llama-cpp-python compiles llama.cpp once (minutes); pip keeps the wheel
$(VENV)/.deps: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	mkdir -p build
	CXXFLAGS="$(CXXFLAGS) $(AMX_FLAGS)" $(BIN)/python -m pip install --quiet llama-cpp-python==0.3.36 "scikit-build-core>=0.10" "cffi>=1.16"
	touch $@

$(VENV)/.installed: $(VENV)/.deps $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation .
	touch $@

# torch is pinned before transformers asks for any: the tests compare with it on the CPU
$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-build-isolation ".[test]"
	touch $@

clean:
	rm -rf build $(VENV)
