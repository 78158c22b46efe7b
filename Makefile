# Everything a person types. `make demo` and `make test` work on a fresh machine: they make .venv,
# install the project into it, and go on; the second call finds it there.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE := setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/*.cu csrc/cuda/*.h)

# The machine code of the kernels is checked under the triton of the GPU machines and the newest one.
TRITON_OLDEST := $(VENV)/triton-3.6.0
TRITON_NEWEST := $(VENV)/triton-3.9.0
AOT := $(BIN)/python -m deit_fast.kernels.aot

.PHONY: install demo test lint format docs plots bench bench-gpu aot aot-golden fuzz sanitize compare clean

install: $(INSTALLED)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo 'deit_fast needs Python 3.10 or newer: make PYTHON=python3.11'; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo 'python3-venv is missing: apt-get install python3-venv'; exit 1; }

$(INSTALLED): $(BIN)/python pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/deit-fast demo

test: $(INSTALLED) $(TRITON_OLDEST)/.installed
	$(BIN)/python -m pytest -q -n auto --dist loadfile

$(VENV)/triton-%/.installed: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target $(@D) triton==$*
	@touch $@

# Compiles all kernels for sm_80, sm_90 and sm_100; needs no GPU.
aot: $(INSTALLED) $(TRITON_OLDEST)/.installed $(TRITON_NEWEST)/.installed
	PYTHONPATH=$(TRITON_OLDEST) $(AOT)
	PYTHONPATH=$(TRITON_NEWEST) $(AOT)

# After a wanted change of a kernel: its new figures, also of the triton that torch brings.
aot-golden: $(INSTALLED) $(TRITON_OLDEST)/.installed $(TRITON_NEWEST)/.installed
	PYTHONPATH=$(TRITON_OLDEST) $(AOT) --write
	PYTHONPATH=$(TRITON_NEWEST) $(AOT) --write
	$(AOT) --write
	$(AOT) --markdown docs/performance.md

# Warnings of the docs are errors: a link or an anchor that leads nowhere ends the build.
SPHINX := $(BIN)/sphinx-build -W --keep-going -q -d build/doctrees

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(SPHINX) -b dummy docs build/docs-check

docs: $(INSTALLED)
	$(SPHINX) -b html docs build/docs
	@echo build/docs/index.html

# After a result file was added: the charts and tables of the performance page.
plots: $(INSTALLED)
	$(BIN)/python -m bench plot --out docs/plots --markdown docs/performance.md
	rm docs/plots/*.png

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python -m bench all

# For a machine with a GPU that may have no network: takes the Python that holds torch there
# (make bench-gpu PYTHON=...), installs nothing from outside, ends in under nine minutes, and leaves
# one JSON file under bench/results/ and one log.
bench-gpu: SHELL := /bin/bash -o pipefail
bench-gpu:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .
	@mkdir -p build
	timeout 200 $(PYTHON) -m pytest -q -m gpu tests 2>&1 | tee build/bench-gpu.log
	timeout 280 $(PYTHON) -m bench all --seconds 220 --device cuda 2>&1 | tee -a build/bench-gpu.log

# The C++ part of the cache under AddressSanitizer and UndefinedBehaviorSanitizer: mutated files for
# so many seconds, and every operation once. Needs g++ or clang++ with their sanitizer libraries.
SECONDS ?= 20
SEED ?= 1
SANITIZED := build/sanitized
SANITIZER_FLAGS := -std=c++17 -g -O2 -fno-omit-frame-pointer -ffp-contract=off -Wall -Wextra \
  -fsanitize=address,undefined -fno-sanitize-recover=all -pthread
CACHE_SOURCES := $(filter-out csrc/bindings.cpp,$(wildcard csrc/*.cpp))

$(SANITIZED)/%: csrc/fuzz/%.cpp $(CACHE_SOURCES) $(wildcard csrc/*.h csrc/fuzz/*.h)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZER_FLAGS) $< $(CACHE_SOURCES) -o $@

fuzz: $(SANITIZED)/fuzz
	$< $(SECONDS) $(SEED)

sanitize: $(SANITIZED)/operations
	rm -rf $(SANITIZED)/cache && mkdir $(SANITIZED)/cache
	$< $(SANITIZED)/cache

# Whether training's numbers moved since a commit: make compare BASE=<commit>
BASE ?= HEAD
compare: $(INSTALLED)
	rm -rf build/base && git worktree prune && git worktree add --force --detach build/base $(BASE)
	cp bench/loss_curve.py build/base/bench/ && cp deit_fast/*.so build/base/deit_fast/
	cd build/base && ln -s ../kernels deit_fast/kernels && \
	  PYTHONPATH=. $(CURDIR)/$(BIN)/python -m bench.loss_curve --out ../base.json
	git worktree remove --force build/base
	$(BIN)/python -m bench.loss_curve --out build/here.json
	$(BIN)/python -m bench.loss_curve --compare build/base.json build/here.json

clean:
	rm -rf build dist *.egg-info deit_fast/*.so
