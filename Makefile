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

# What Inductor writes for a GPU is checked under the torch of the GPU machines, which brings CUDA's
# libraries along: 4.8 GB. A pip --target beside the installed torch would share them, but only as
# long as both are of one CUDA.
TORCH_OLDEST := $(VENV)/torch-2.11.0
TORCH_PACKAGES := torch==2.11.0 torchvision==0.26.0 timm==1.0.31
TRAFFIC := $(TORCH_OLDEST)/bin/python -m bench traffic

.PHONY: install demo test lint format docs plots bench bench-gpu profile-gpu aot aot-golden traffic traffic-golden fuzz fuzz-guided sanitize emulate compare clean

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

test: $(INSTALLED) $(TRITON_OLDEST)/.installed $(TORCH_OLDEST)/.installed
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

$(VENV)/triton-%/.installed: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target $(@D) triton==$*
	@touch $@

$(TORCH_OLDEST)/.installed: | $(BIN)/python
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_PACKAGES)
	@touch $@

# Counts what a compiled block launches and moves on an H100; needs no GPU.
traffic: $(TORCH_OLDEST)/.installed
	$(TRAFFIC) --check

# After a wanted change of that: the golden table, and the predictions on the performance page.
traffic-golden: $(INSTALLED) $(TORCH_OLDEST)/.installed
	$(TRAFFIC) --write
	$(BIN)/python -m bench roofline --markdown docs/performance.md

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

# For a machine with a GPU that may have no network: they take the Python that holds torch there
# (make bench-gpu PYTHON=...), install nothing from outside, and each ends within nine minutes.
# bench-gpu measures, profile-gpu explains; both write into the folder OUT as they go (bench/gpu.py).
# COMMIT names the commit where git cannot; APEX the folder with the source of NVIDIA's apex.
OUT ?=
COMMIT ?=
APEX ?=
export APEX
GPU_OPTIONS = $(if $(OUT),--out '$(OUT)') $(if $(COMMIT),--commit $(COMMIT))
bench-gpu:
	$(PYTHON) -m bench gpu $(GPU_OPTIONS)

profile-gpu:
	$(PYTHON) -m bench gpu-profile $(GPU_OPTIONS)

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

# The same checks, led by libFuzzer to code not yet reached; needs clang++. What it found of interest
# stays in build/corpus, and the next run goes on from there.
CLANGXX ?= clang++
$(SANITIZED)/guided: csrc/fuzz/guided.cpp $(CACHE_SOURCES) $(wildcard csrc/*.h csrc/fuzz/*.h)
	@mkdir -p $(@D)
	$(CLANGXX) $(SANITIZER_FLAGS) -fsanitize=fuzzer $< $(CACHE_SOURCES) -o $@

fuzz-guided: $(SANITIZED)/guided
	@mkdir -p build/corpus
	$< -max_total_time=$(SECONDS) -max_len=512 -print_final_stats=1 -artifact_prefix=build/ build/corpus

sanitize: $(SANITIZED)/operations
	rm -rf $(SANITIZED)/cache && mkdir $(SANITIZED)/cache
	$< $(SANITIZED)/cache

# The CUDA part of the cache without a GPU: its kernels, compiled for the CPU against csrc/emulator,
# give the host's bytes. First with those two sanitizers, then with the one that finds races.
EMULATED := build/emulated
EMULATOR_FLAGS := -std=c++17 -g -fno-omit-frame-pointer -fno-strict-aliasing -ffp-contract=off -Wall -Wextra \
  -Wno-unknown-pragmas -Icsrc/emulator -pthread
KERNELS := $(wildcard csrc/cuda/*.cu csrc/emulator/*.cu)
$(EMULATED)/address: SANITIZER := -fsanitize=address,undefined -fno-sanitize-recover=all -DDF_PROCESSORS=1
$(EMULATED)/thread: SANITIZER := -fsanitize=thread -DDF_PROCESSORS=2

# Without a sanitizer: what runs the kernels, and what they are compared with.
$(EMULATED)/%.o: csrc/%.cpp $(wildcard csrc/*.h csrc/fuzz/*.h csrc/emulator/*.h)
	@mkdir -p $(@D)
	$(CXX) $(EMULATOR_FLAGS) -O2 -c $< -o $@

# The objects first: of a template's two versions the linker takes the first.
$(EMULATED)/address $(EMULATED)/thread: $(EMULATED)/emulator/emulator.o $(EMULATED)/record_codec.o \
  csrc/emulator/emulate.cpp $(KERNELS) $(wildcard csrc/*.h csrc/cuda/*.h csrc/fuzz/*.h csrc/emulator/*.h)
	$(CXX) $(EMULATOR_FLAGS) $(SANITIZER) -O1 $(filter %.o,$^) -x c++ $(KERNELS) csrc/emulator/emulate.cpp -o $@

emulate: $(EMULATED)/address $(EMULATED)/thread
	$(EMULATED)/address $(SECONDS) $(SEED)
	$(EMULATED)/thread $(SECONDS) $(SEED)

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
