# make demo   sets up .venv, trains CE, TAL and FMFP with TAL on real digits, evaluates and compares them
# make test   sets up .venv and runs the fast tests; make test-all runs all of them
# make test-peers   tests with Lightning, transformers and other libraries, in an environment of their own
# make lint   ruff and mypy
# make sanitize  builds csrc with AddressSanitizer and UBSan and runs its tests; threads on a queue with ThreadSanitizer
# make docs   builds the documentation site into build/site
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
comma := ,
CONSTRAINTS ?= -c constraints.txt
# DALI has wheels for Linux only; elsewhere the torch loader serves.
EXTRAS := $(if $(filter Linux,$(shell uname -s)),dev$(comma)dali,dev)
BIN := $(VENV)/bin
RUNS ?= runs
JOBS ?= auto
BENCHMARKS ?= step linear loss typicalness queue training metrics
# Benchmarks keep the memory they free: else glibc, by what ran before in the process, gives it back after every step or
# does not, and a list queue's step at B = 128, N = 30,000 takes 54 or 14 ms.
KEEP := MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_MMAP_THRESHOLD_=17179869184

.PHONY: setup demo test test-slow test-all test-peers lint typecheck sanitize sanitize-memory sanitize-threads docs kernels-check kernels-report kernels-report-all \
    bench-smoke bench clean

setup: $(VENV)/.ready

# torch first: the extension is built against it, so the build must not be isolated from it.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is older than Python 3.10; name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/pip install --quiet $(CONSTRAINTS) "torch>=2.9" torchvision
	$(BIN)/pip install --no-build-isolation $(CONSTRAINTS) -v -e ".[$(EXTRAS)]" > $(VENV)/install.log 2>&1 || { tail -n 30 $(VENV)/install.log; exit 1; }
	@grep -h "tal-fast: " $(VENV)/install.log || true
	$(BIN)/python -m tal_fast.info
	touch $@

demo: setup
	$(BIN)/python -m tal_fast.experiment examples/experiments/demo.yaml --output $(RUNS)/demo

# The tests of a file stay in one process, which makes the runs they share once; one thread each, as all cores are in use.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test: setup
	$(PYTEST) -m "not slow"

test-slow: setup
	$(PYTEST) -m slow

test-all: test test-slow

# An environment that sees .venv: torch is not installed twice, and the constraints keep .venv's versions.
PEERS := build/peers
PURELIB := python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(PEERS)/.ready: $(VENV)/.ready tests/peers/requirements.txt
	rm -rf $(PEERS)
	$(BIN)/python -m venv $(PEERS)
	echo "import site; site.addsitedir('$$($(BIN)/$(PURELIB))')" > "$$($(PEERS)/bin/$(PURELIB))/project.pth"
	$(BIN)/pip freeze --exclude-editable > $(PEERS)/constraints.txt
	$(PEERS)/bin/pip install --quiet -c $(PEERS)/constraints.txt -r tests/peers/requirements.txt
	touch $@

# The guides' examples run too, as their libraries are there.
test-peers: $(PEERS)/.ready
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PEERS)/bin/python -m pytest -n $(JOBS) tests/peers \
	    tests/integration/test_readme.py::test_examples_run_as_they_stand

lint: setup typecheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy follows no editable install to kernels/, so it reads an installed copy
typecheck: setup
	rm -rf build/typecheck
	TAL_FAST_NO_EXTENSION=1 $(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/typecheck .
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml tal_fast

sanitize: sanitize-memory sanitize-threads

# A copy of the tree, because the extension is loaded from the package's folder. Python and PyTorch are not instrumented:
# no leaks are looked for, the runtimes are preloaded, and -s lets their messages through.
SANITIZE := -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1
sanitize-memory: setup
	rm -rf build/sanitize
	mkdir -p build/sanitize
	cp -a tal_fast kernels csrc tests bench setup.py pyproject.toml README.md LICENSE build/sanitize
	rm -f build/sanitize/tal_fast/_C*
	ln -sfn ../kernels build/sanitize/tal_fast/kernels
	cd build/sanitize && CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" ../../$(BIN)/python setup.py --quiet build_ext --inplace
	cd build/sanitize && PYTHONPATH=$$PWD OMP_NUM_THREADS=2 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	    ../../$(BIN)/python -m pytest -q -x -s -p no:cacheprovider -W ignore -m "not slow" tests/loss \
	    -k "(native or index or one_call) and not compile and not time and not instruction_set"

sanitize-threads:
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -fsanitize=thread -ffp-contract=off -Wno-psabi -Icsrc tests/csrc/threads.cpp csrc/kernels_cpu.cpp -o build/threads -pthread
	build/threads

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site

# Every Triton kernel compiled for GPUs that are not present, and its machine code held to the committed report.
REPORTS := bench/results/kernels
kernels-check: setup
	$(BIN)/python -m bench.kernel_cost.compile_check --budget $(REPORTS)/triton-3.8.json

# After a change of the kernels: the report that the check compares with.
kernels-report: setup
	$(BIN)/python -m bench.kernel_cost.compile_check --report $(REPORTS)/triton-3.8.json

# Before a release: also with the Triton of other supported versions of torch, the oldest among them.
kernels-report-all: kernels-report
	for pair in 2.11.0:3.6 2.9.0:3.5; do \
	    env=build/torch-$${pair%:*}; \
	    [ -e $$env/.ready ] || { $(PYTHON) -m venv $$env && $$env/bin/pip install --quiet torch==$${pair%:*} numpy && touch $$env/.ready; } || exit 1; \
	    PYTHONPATH=$$PWD $$env/bin/python -m bench.kernel_cost.compile_check --report $(REPORTS)/triton-$${pair#*:}.json || failed=1; \
	done; exit $${failed:-0}

# Ratios to a floor that runs in turns, against the committed ones of a CPU with the same vector instructions: half as slow
# again, beyond the noise, is a failure.
bench-smoke: setup
	mkdir -p build/bench
	$(KEEP) $(BIN)/python -m pytest bench --benchmark-only --size smoke --benchmark-json=build/bench/cpu-smoke.json -q
	$(BIN)/python -m bench.compare bench/results/smoke build/bench/cpu-smoke.json --tolerance 0.5
	PYTHON=$(BIN)/python OUT=build/bench bench/gpu.sh --smoke

# The metrics beside other libraries': in the environment of the peers.
bench: setup $(PEERS)/.ready
	vectors=$$($(BIN)/python -c 'from bench.harness import environment; print(environment()["vectors"])') && \
	    $(KEEP) $(BIN)/python -m pytest bench --benchmark-only --size smoke --benchmark-json=bench/results/smoke/$$vectors.json -q
	for part in $(BENCHMARKS); do \
	    $(KEEP) $(BIN)/python -m pytest bench/bench_$$part.py --benchmark-only --benchmark-json=bench/results/cpu/$$part.json -q || exit 1; \
	done
	$(BIN)/python -m bench.loaders --out bench/results/loaders_cpu.json
	$(PEERS)/bin/python -m bench.metrics --out bench/results/metrics_cpu.json
	$(BIN)/python -m bench.report

clean:
	rm -rf $(VENV) build dist *.egg-info tal_fast/_C*.so
