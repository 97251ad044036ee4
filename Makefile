# Everything from a bare machine with Python >= 3.10, make and g++: each target makes its own
# environment first. torch is installed before the build, which then uses it (no build isolation).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= $(shell nproc)
BIN := $(VENV)/bin
RUN := $(BIN)/python
# Quiet, and no prompts; installs are idempotent and fast when nothing changed.
PIP := $(RUN) -m pip install -q --disable-pip-version-check

.PHONY: help demo test bench bench-quick lint cuda-check install clean
help:
	@echo "make demo        train FS-MTL on real images beside the plain method (about 6 minutes)"
	@echo "make test        build and run the tests"
	@echo "make bench       kernels and aggregation against pure PyTorch and peers -> docs/benchmarks.md"
	@echo "make bench-quick the same on small sizes, in about a minute; writes nothing"
	@echo "make lint        ruff, mypy, clang-format"
	@echo "make cuda-check  compile the CUDA library for every architecture; fails on a spill"
	@echo "variables: TORCH ($(TORCH)), PYTHON, VENV, FLATMTL_CUDA=0|1|auto, WORKERS ($(WORKERS)) of make test"

$(VENV)/.torch: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" "setuptools>=77" wheel ninja pybind11 numpy
	touch $@

# The build is incremental (ninja); an editable install, so that sources and package are one. A target
# says which extras it needs; EXTRAS on the command line goes before that.
install: $(VENV)/.torch
	$(PIP) --no-build-isolation -e ".$(EXTRAS)"

# The demo trains on the CPU; leaving CUDA out saves minutes of compilation.
demo: export FLATMTL_CUDA ?= 0
demo: EXTRAS = [demo]
demo: install
	$(RUN) -m flatmtl demo $(DEMO)

test: EXTRAS = [test,demo]
test: install
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal $(TESTS)

bench bench-quick: EXTRAS = [bench,peers]
bench: install
	mkdir -p bench/results
	$(RUN) -m pytest bench -q -p no:cacheprovider --benchmark-json=bench/results/cpu.json $(BENCH)
	$(RUN) -m bench.report

bench-quick: install
	$(RUN) -m pytest bench --quick -q -p no:cacheprovider

lint: EXTRAS = [lint,demo]
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(RUN) -m mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cuh' '*.cu')

# No kernel may spill or have a stack frame; gram and combine must load 16 bytes at a time.
cuda-check: export FLATMTL_CUDA = 1
cuda-check: install
	$(PIP) --no-deps nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(RUN) bench/ptxas_report.py build/native-*/cuda | tail -n 4

clean:
	rm -rf build dist *.egg-info flatmtl/*.so
