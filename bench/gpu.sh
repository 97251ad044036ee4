#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds, tests, sanitizes and measures. Each part runs alone.
#   bench/gpu.sh build | test | sanitize | bench | all
# Needs a torch built for CUDA, nvcc and compute-sanitizer on the PATH, and in the environment what
# --no-build-isolation needs: setuptools, ninja, pybind11; numpy and pytest. torchjd is compared with
# where it is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

build() {
  local own
  own=$(nvidia-smi --id=0 --query-gpu=compute_cap --format=csv,noheader)
  # this device alone: four architectures take four times as long
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$own} FLATMTL_CUDA=1 \
    "$PYTHON" -m pip install --no-build-isolation --no-deps -e .
  "$PYTHON" - <<'PY'
import torch
from flatmtl.ops import OPERATORS, _library

print("torch", torch.__version__, torch.cuda.get_device_name(0), _library.missing)
without = [name for name in OPERATORS if _library.body(name, "cuda") != "cuda"]
assert not without, f"no CUDA body for {without}"
PY
}

tests() { "$PYTHON" -m pytest tests -m gpu -q; }

sanitize() {
  # Every allocation on its own, so that memcheck sees a read past the end of a tensor.
  local tool
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 280 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$PYTHON" -m bench.sanitize
  done
}

bench() { "$PYTHON" -m bench.gpu; }

case "${1:-all}" in
  build) build ;;
  test) tests ;;
  sanitize) sanitize ;;
  bench) bench ;;
  all) build; tests; sanitize; bench ;;
  *) echo "usage: bench/gpu.sh build|test|sanitize|bench|all" >&2; exit 2 ;;
esac
