# Every target starts from a bare checkout: it makes .venv, installs, builds the engine, fetches data, and runs.
# A second run repeats nothing that is there.
#
#   make PIP_ARGS="--extra-index-url ..."   passes more arguments to pip, for another build of torch, say
#   make PYTHON=python3.12                  takes another Python (3.11 or newer)
#   make bench BENCH_ARGS="--only layers"   what to measure; python -m lowbit.bench --help has the rest

PYTHON ?= python3
PIP_ARGS ?=
BENCH_ARGS ?=
BIN := .venv/bin
RECIPE := recipes/fashion-mnist/bireal14-w1a1-slb-demo.yaml
DEMO := runs/demo
SR_RECIPES := recipes/superres
SR_DEMO := runs/demo-sr
SR_LINEAR := runs/demo-sr-linear
SR_PICTURE := /usr/share/doc/opencv-doc/examples/data/graf1.png
PHOTOGRAPHS := lomiri-wallpapers-16.04 plasma-workspace-wallpapers mate-backgrounds opencv-doc
ENGINE := CMakeLists.txt $(shell find engine -name '*.cc' -o -name '*.h' -o -name '*.inc' -o -name '*.txt')
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo demo-sr test test-engine test-asan test-arm test-long test-recipes lint format bench bench-lce data data-sr clean install
help:
	@echo "make demo    train a 1-bit network on Fashion-MNIST, export it, prove it, time it (5 to 10 minutes on 2 cores)"
	@echo "make demo-sr train a 1-bit network that doubles pictures, and a linear control; export, prove, enlarge (3 minutes on 2 idle cores)"
	@echo "make test    the test suite"
	@echo "make test-engine   the engine on over 2,000 random graphs, and against guard pages (about 3 minutes)"
	@echo "make test-asan     the engine's tests under AddressSanitizer and UndefinedBehaviorSanitizer (about 6 minutes)"
	@echo "make test-arm      the engine's rows for ARM under qemu, on 2,000 random networks (about 5 minutes)"
	@echo "make test-long     kill training at twenty random moments and at each file that it writes, and resume it (about 4 minutes)"
	@echo "make test-recipes  train the papers' networks two steps at full size, export and prove them (about 25 minutes on 2 cores)"
	@echo "make lint    ruff and mypy"
	@echo "make bench   the engine beside ONNX Runtime, OpenVINO and PyTorch, a training step beside a float one (a few minutes)"
	@echo "make bench-lce     the binary layers beside Larq Compute Engine, in an environment of its own (.venv-lce, 2 GB)"
	@echo "make data-sr       install the photographs of super-resolution's recipes (Debian packages, as root)"
	@echo "make clean   remove what the above made, but for .venv and runs"

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt $(ENGINE)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "lowbit needs Python 3.11 or newer: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt $(PIP_ARGS) scikit-build-core nanobind cmake ninja
	$(PIP) install -q -c constraints.txt $(PIP_ARGS) --no-build-isolation -e '.[dev]'
	@touch $@

# Debian has the data set as a package; elsewhere, or without the right to install, lowbit downloads it.
data:
	@test -e /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz || \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  apt-get install -y -qq dataset-fashion-mnist >/dev/null 2>&1 || \
	  { apt-get update -qq && apt-get install -y -qq dataset-fashion-mnist >/dev/null; } || true; \
	fi

# The photographs of super-resolution's recipes lie in Debian packages (250 MB to fetch); the pictures they are tested on there and in scikit-image.
data-sr:
	@test -e /usr/share/backgrounds/mate/nature/Wood.jpg -a -e /usr/share/backgrounds/Dragonfly_by_Bolly.jpg \
	  -a -e /usr/share/wallpapers/Kite/contents/images/2560x1600.jpg -a -e /usr/share/doc/opencv-doc/examples/data/graf1.png || \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  apt-get install -y -qq --no-install-recommends $(PHOTOGRAPHS) >/dev/null 2>&1 || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends $(PHOTOGRAPHS) >/dev/null; } || true; \
	fi

demo: $(DEMO)/report.html
	@$(BIN)/lowbit report $(DEMO) --summary

# One thread: the network is so small that a second one gains little, and on a busy machine OpenMP's waiting costs far more.
$(DEMO)/checkpoints/final.ckpt: $(RECIPE) | .venv/.installed data
	OMP_NUM_THREADS=1 $(BIN)/lowbit train $(RECIPE) --run-dir $(DEMO) --overwrite

$(DEMO)/model.lowbit: $(DEMO)/checkpoints/final.ckpt
	$(BIN)/lowbit export $(DEMO)

$(DEMO)/bench.json: $(DEMO)/model.lowbit
	$(BIN)/lowbit bench $(DEMO)/model.lowbit --json $@

$(DEMO)/report.html: $(DEMO)/bench.json
	$(BIN)/lowbit report $(DEMO)

demo-sr: $(SR_DEMO)/bench.json $(SR_LINEAR)/checkpoints/final.ckpt
	$(BIN)/lowbit evaluate $(SR_DEMO)/model.lowbit --split test --beside $(SR_LINEAR)
	$(BIN)/lowbit upscale $(SR_DEMO)/model.lowbit $(SR_PICTURE) $(SR_DEMO)/larger.png --force --compare $(SR_DEMO)/compare.html
	$(BIN)/lowbit report $(SR_DEMO)
	@$(BIN)/lowbit report $(SR_DEMO) --summary

$(SR_DEMO)/checkpoints/final.ckpt: $(SR_RECIPES)/sr-x2-w1a1-sign.yaml | .venv/.installed data-sr
	OMP_NUM_THREADS=1 $(BIN)/lowbit train $< --run-dir $(SR_DEMO) --overwrite

$(SR_LINEAR)/checkpoints/final.ckpt: $(SR_RECIPES)/sr-x2-linear.yaml | .venv/.installed data-sr
	OMP_NUM_THREADS=1 $(BIN)/lowbit train $< --run-dir $(SR_LINEAR) --overwrite

$(SR_DEMO)/model.lowbit: $(SR_DEMO)/checkpoints/final.ckpt
	$(BIN)/lowbit export $(SR_DEMO)

$(SR_DEMO)/bench.json: $(SR_DEMO)/model.lowbit
	$(BIN)/lowbit bench $(SR_DEMO)/model.lowbit --repeats 30 --json $@

test: .venv/.installed data
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The compiler and qemu come as Debian packages. Where they are there, `make test` runs the shorter half of this, too.
test-arm: .venv/.installed
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64-static >/dev/null || \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  apt-get install -y -qq g++-aarch64-linux-gnu qemu-user-static >/dev/null 2>&1 || \
	  { apt-get update -qq && apt-get install -y -qq g++-aarch64-linux-gnu qemu-user-static >/dev/null; } || true; \
	fi
	LOWBIT_TEST_ARM=1 LOWBIT_TEST_ARM_GRAPHS=$${LOWBIT_TEST_ARM_GRAPHS:-2000} $(BIN)/python -m pytest tests/test_arm.py

# The engine against the interpreter on over 2,000 random graphs, whose seed is printed; LOWBIT_TEST_GRAPHS, LOWBIT_TEST_SEED
# and LOWBIT_TEST_GUARDED (graphs against guard pages, each side) choose others.
test-engine: .venv/.installed
	LOWBIT_TEST_GRAPHS=$${LOWBIT_TEST_GRAPHS:-2000} LOWBIT_TEST_GUARDED=$${LOWBIT_TEST_GUARDED:-1500} OMP_NUM_THREADS=1 \
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'slow or not slow' tests/test_engine.py tests/test_guard.py

# The same tests on an engine with AddressSanitizer and UndefinedBehaviorSanitizer (g++), whose library has to be loaded first.
SANITIZED := build/sanitized
test-asan: .venv/.installed
	CXX=g++ $(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_BUILD_TYPE=RelWithDebInfo -DLOWBIT_SANITIZE=address,undefined >/dev/null
	$(BIN)/cmake --build $(SANITIZED)
	LOWBIT_TEST_ENGINE=$$(ls $(abspath $(SANITIZED))/_engine*.so) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	LOWBIT_TEST_GRAPHS=$${LOWBIT_TEST_GRAPHS:-300} LOWBIT_TEST_GUARDED=$${LOWBIT_TEST_GUARDED:-100} OMP_NUM_THREADS=1 \
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/test_engine.py tests/test_guard.py

# LOWBIT_TEST_SEED=N draws the same moments again
test-long: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow tests/test_kill.py

test-recipes: .venv/.installed
	$(BIN)/python -m pytest -m slow tests/test_models.py tests/test_recipes.py

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed
	$(BIN)/python -m lowbit.bench $(BENCH_ARGS)

bench-lce: .venv/.installed .venv-lce/.installed
	$(BIN)/python -m lowbit.bench.lce

.venv-lce/.installed: constraints-lce.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 12) else "Larq Compute Engine 0.16 has wheels for Python 3.10 to 3.12 only: make bench-lce PYTHON=python3.12")'
	@test -x .venv-lce/bin/python || $(PYTHON) -m venv .venv-lce
	@.venv-lce/bin/python -m pip --disable-pip-version-check install -q -c constraints-lce.txt $(PIP_ARGS) larq-compute-engine larq tensorflow tf-keras || \
	{ echo "Larq Compute Engine and its TensorFlow can't be installed here (constraints-lce.txt has their versions; wheels are for Linux and macOS on x86-64 and arm64); make bench runs without them" >&2; exit 1; }
	@touch $@

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .venv-lce bench.json bench-lce.json
