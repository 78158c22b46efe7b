# Every command for developers. On a fresh machine they first create .venv and install the project into
# it: `make demo` with what a user needs, the others with the tools of development too.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# A module is compiled when it is first imported, which most of the 20,000 never are.
PIP_OPTIONS := --disable-pip-version-check --no-compile
NATIVE := setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/*.cu csrc/cuda/*.h)

# The machine code of the kernels is checked with the triton version of the GPU machines and the newest.
TRITON_OLDEST := $(VENV)/triton-3.6.0
TRITON_NEWEST := $(VENV)/triton-3.9.0
AOT := $(BIN)/python -m deit_fast.kernels.aot

# Inductor's kernels are checked with the torch version of the GPU machines, whose environment holds
# CUDA's libraries: 4.8 GB. `pip --target` beside the installed torch would share them only while both
# need the same CUDA version.
TORCH_OLDEST := $(VENV)/torch-2.11.0
TORCH_PACKAGES := torch==2.11.0 torchvision==0.26.0 timm==1.0.31
TRAFFIC := $(TORCH_OLDEST)/bin/python -m bench traffic

.PHONY: install environments demo test lint format docs plots bench bench-gpu profile-gpu aot aot-golden traffic traffic-golden fuzz sanitize emulate compare clean

install: $(INSTALLED)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo 'deit_fast needs Python 3.10 or newer: make PYTHON=python3.11'; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo 'python3-venv is missing: apt-get install python3-venv'; exit 1; }

$(INSTALLED): $(BIN)/python pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --quiet $(PIP_OPTIONS) -e '.[dev]'
	@touch $@

# An environment of development has all that the demo needs.
DEMO_INSTALLED := $(if $(wildcard $(INSTALLED)),$(INSTALLED),$(VENV)/.installed-demo)

$(VENV)/.installed-demo: $(BIN)/python pyproject.toml $(NATIVE)
	@echo "Installing into $(VENV): 3 GB to download, 6 GB on disk, nearly all of it PyTorch with NVIDIA's"
	@echo "libraries. docs/faq.md says how to install less on a machine without an NVIDIA GPU."
	$(BIN)/python -m pip install $(PIP_OPTIONS) -e .
	@touch $@

demo: $(DEMO_INSTALLED)
	$(BIN)/deit-fast demo

# Of tests that need another triton or torch.
environments: $(TRITON_OLDEST)/.installed $(TORCH_OLDEST)/.installed

test: $(INSTALLED) environments
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

$(VENV)/triton-%/.installed: | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_OPTIONS) --no-deps --upgrade \
	  --target $(@D) triton==$*
	@touch $@

$(TORCH_OLDEST)/.installed: | $(BIN)/python
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(PIP_OPTIONS) $(TORCH_PACKAGES)
	@touch $@

# Counts the launches of a compiled block and its memory traffic on an H100; needs no GPU.
traffic: $(TORCH_OLDEST)/.installed
	$(TRAFFIC) --check

# After an intended change: writes the golden table and the predictions on the performance page.
traffic-golden: $(INSTALLED) $(TORCH_OLDEST)/.installed
	$(TRAFFIC) --write
	$(BIN)/python -m bench roofline --markdown docs/performance.md

# Compiles all kernels for sm_80, sm_90 and sm_100; needs no GPU.
aot: $(INSTALLED) $(TRITON_OLDEST)/.installed $(TRITON_NEWEST)/.installed
	PYTHONPATH=$(TRITON_OLDEST) $(AOT)
	PYTHONPATH=$(TRITON_NEWEST) $(AOT)

# After an intended change of a kernel: writes its figures, also for the triton that torch requires.
aot-golden: $(INSTALLED) $(TRITON_OLDEST)/.installed $(TRITON_NEWEST)/.installed
	PYTHONPATH=$(TRITON_OLDEST) $(AOT) --write
	PYTHONPATH=$(TRITON_NEWEST) $(AOT) --write
	$(AOT) --write
	$(AOT) --markdown docs/performance.md

# Sphinx's warnings are errors: a broken link or anchor ends the build.
SPHINX := $(BIN)/sphinx-build -W --keep-going -q -d build/doctrees

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(SPHINX) -b dummy docs build/docs-check

docs: $(INSTALLED)
	$(SPHINX) -b html docs build/docs
	@echo build/docs/index.html

# After adding a result file: draws the charts and tables of the performance page.
plots: $(INSTALLED)
	$(BIN)/python -m bench plot --out docs/plots --markdown docs/performance.md
	rm docs/plots/*.png

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python -m bench all

# For a machine with a GPU and perhaps without a network: both use the Python that has torch there
# (make bench-gpu PYTHON=...), download nothing, and end within nine minutes. bench-gpu measures,
# profile-gpu profiles; both write to the folder OUT while they run (bench/gpu.py). COMMIT: the commit,
# where git is missing. APEX: the folder of NVIDIA's apex sources.
OUT ?=
COMMIT ?=
APEX ?=
export APEX
GPU_OPTIONS = $(if $(OUT),--out '$(OUT)') $(if $(COMMIT),--commit $(COMMIT))
bench-gpu:
	$(PYTHON) -m bench gpu $(GPU_OPTIONS)

profile-gpu:
	$(PYTHON) -m bench gpu-profile $(GPU_OPTIONS)

# The C++ part of the cache under AddressSanitizer and UndefinedBehaviorSanitizer: `fuzz` reads mutated
# files for SECONDS of CPU time, `sanitize` runs every operation once. Both need g++ or clang++ with
# their sanitizer libraries.
SECONDS ?= 20
SEED ?= 1
SANITIZED := build/sanitized
SANITIZER_FLAGS := -std=c++17 -g -O2 -fno-omit-frame-pointer -ffp-contract=off -Wall -Wextra \
  -fsanitize=address,undefined -fno-sanitize-recover=all -pthread
CACHE_SOURCES := $(filter-out csrc/bindings.cpp,$(wildcard csrc/*.cpp))

RIGS := tests/native
$(SANITIZED)/%: $(RIGS)/fuzz/%.cpp $(CACHE_SOURCES) $(wildcard csrc/*.h $(RIGS)/fuzz/*.h)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZER_FLAGS) $< $(CACHE_SOURCES) -o $@

fuzz: $(SANITIZED)/fuzz
	$< $(SECONDS) $(SEED)

sanitize: $(SANITIZED)/operations
	rm -rf $(SANITIZED)/cache && mkdir $(SANITIZED)/cache
	$< $(SANITIZED)/cache

# The CUDA part of the cache without a GPU: its kernels, compiled for the CPU against the emulator, must
# give the bytes of the host's code. Built with the two sanitizers above, then with ThreadSanitizer.
EMULATED := build/emulated
EMULATOR_FLAGS := -std=c++17 -g -fno-omit-frame-pointer -fno-strict-aliasing -ffp-contract=off -Wall -Wextra \
  -Wno-unknown-pragmas -I$(RIGS)/emulator -pthread
KERNELS := $(wildcard csrc/cuda/*.cu $(RIGS)/emulator/*.cu)
$(EMULATED)/address: SANITIZER := -fsanitize=address,undefined -fno-sanitize-recover=all -DDF_PROCESSORS=1
$(EMULATED)/thread: SANITIZER := -fsanitize=thread -DDF_PROCESSORS=2

# The emulator and the code that its results are compared with have no sanitizer.
EMULATED_SOURCES := $(RIGS)/emulator/emulator.cpp csrc/record_codec.cpp
EMULATED_HEADERS := $(wildcard csrc/*.h $(RIGS)/fuzz/*.h $(RIGS)/emulator/*.h)
vpath %.cpp $(dir $(EMULATED_SOURCES))
$(EMULATED)/%.o: %.cpp $(EMULATED_HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(EMULATOR_FLAGS) -O2 -c $< -o $@

# Objects come first: of two versions of a template the linker keeps the first.
$(EMULATED)/address $(EMULATED)/thread: $(EMULATED)/emulator.o $(EMULATED)/record_codec.o \
  $(RIGS)/emulator/emulate.cpp $(KERNELS) $(EMULATED_HEADERS) $(wildcard csrc/cuda/*.h)
	$(CXX) $(EMULATOR_FLAGS) $(SANITIZER) -O1 $(filter %.o,$^) -x c++ $(KERNELS) $(RIGS)/emulator/emulate.cpp -o $@

emulate: $(EMULATED)/address $(EMULATED)/thread
	$(EMULATED)/address $(SECONDS) $(SEED)
	$(EMULATED)/thread $(SECONDS) $(SEED)

# Compares the loss curves with those of a commit: make compare BASE=<commit>
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
