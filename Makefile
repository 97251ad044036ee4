# Everything from a bare machine with Python >= 3.10, make and g++: each target makes its own
# environment first. torch is installed before the build, which then uses it (no build isolation).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

TORCH ?= torch==2.13.0
# What a wheel is tried with: the oldest and the newest. Where pip's index has no CPU build of them the
# CUDA build comes, which takes 7 GB each and works without a GPU.
SMOKE ?= torch==2.10.0 torch==2.15.0
CUDA ?= 13.0
# Architectures of a wheel where they are to be others than those that the README promises.
ARCHS ?=
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= $(shell nproc)
BIN := $(VENV)/bin
RUN := $(BIN)/python
# Quiet, and no prompts; installs are idempotent and fast when nothing changed.
PIP := $(RUN) -m pip install -q --disable-pip-version-check

.PHONY: help demo test bench bench-quick lint cuda-check install wheel wheel-check sdist clean
help:
	@echo "make demo        train FS-MTL on real images beside the plain method (about 6 minutes)"
	@echo "make test        build and run the tests"
	@echo "make bench       kernels and aggregation against pure PyTorch and peers -> docs/benchmarks.md"
	@echo "make bench-quick the same on small sizes, in about a minute; writes nothing"
	@echo "make lint        ruff, mypy, clang-format"
	@echo "make wheel       dist/*.whl for CUDA=13.0 (13.2; 12.8, 12.6 by clang-19), audited, tried with SMOKE=torches"
	@echo "make wheel-check pack what is compiled already; audited and tried with TORCH, in build/check/"
	@echo "make sdist       dist/*.tar.gz, installed without nvcc and tried"
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

# No kernel may spill or have a stack frame; loops over rows must load 16 bytes at a time.
cuda-check: export FLATMTL_CUDA = 1
cuda-check: install
	$(PIP) --no-deps nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(RUN) bench/ptxas_report.py build/native-*/cuda --markdown build/kernels_static.md | tail -n 4
	diff -q docs/kernels_static.md build/kernels_static.md || \
	  { echo "docs/kernels_static.md must be what CUDA 13.0 makes of the kernels: copy build/kernels_static.md there"; exit 1; }

# A PYTHON that was asked for must be that of the environment, which may be an older one.
wheel: $(VENV)/.torch
	BIN=$(BIN) PYTHON="$(if $(filter file,$(origin PYTHON)),,$(PYTHON))" ARCHS="$(ARCHS)" SMOKE="$(SMOKE)" \
	  .ci/wheel $(CUDA)

wheel-check: install
	BIN=$(BIN) PYTHON= ARCHS="$(ARCHS)" SMOKE="$(TORCH)" .ci/wheel built

sdist: $(VENV)/.torch
	BIN=$(BIN) SMOKE="$(TORCH)" .ci/sdist

clean:
	rm -rf build dist *.egg-info flatmtl/*.so
