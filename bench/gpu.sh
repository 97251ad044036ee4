#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds, tests, sanitizes and measures, in under 10 minutes.
#
#   bench/gpu.sh all                            every part, each stopped at the end of its time
#   bench/gpu.sh PART                           one: build test sanitize ceiling kernels solvers
#                                               aggregate steps variants table
#   LIMIT=300 bench/gpu.sh PART                 one, with so many seconds
#   bench/gpu.sh PART|all --device cpu --quick  no GPU: all but the CUDA calls
#
# Needs a torch built for CUDA, nvcc and compute-sanitizer on the PATH, and in the environment of PYTHON
# setuptools, ninja, pybind11, numpy and pytest. torchjd is compared with where it is installed. Nothing
# is installed. docs/gpu.md says what the parts do and how to read the table.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
PARTS="build test sanitize ceiling kernels solvers aggregate steps variants table"
# seconds, together less than 10 minutes
declare -A LIMITS=([build]=115 [test]=95 [sanitize]=70 [ceiling]=20 [kernels]=115 [solvers]=40
  [aggregate]=40 [steps]=55 [variants]=20 [table]=10)
STARTING=12 # seconds of a limit that importing torch and ending in order may take

build() {
  local own
  own=$(nvidia-smi --id=0 --query-gpu=compute_cap --format=csv,noheader)
  # this device alone: four architectures take four times as long
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$own} FLATMTL_CUDA=1 \
    "$PYTHON" setup.py -q build_ext --inplace
  "$PYTHON" - <<'PY'
import torch
from flatmtl.ops import OPERATORS, _library

print("torch", torch.__version__, torch.cuda.get_device_name(0), _library.missing)
without = [name for name in OPERATORS if _library.body(name, "cuda") != "cuda"]
assert not without, f"no CUDA body for {without}"
PY
}

# A process a file, several at once; a file whose imports are missing here fails by itself.
run_tests() {
  grep -lE 'mark\.gpu|def test\w*\(.*\b(body|device)\b' tests/test_*.py |
    PYTHON=$PYTHON xargs -P 12 -I{} bash -c '
      code=0
      log=$("$PYTHON" -m pytest "$1" -m gpu -q -p no:cacheprovider --tb=short 2>&1) || code=$?
      ((code != 5)) || exit 0 # none of its tests is marked
      ((code == 0)) || tail -n 60 <<<"$log"
      echo "$1: $(tail -n 1 <<<"$log")"
      exit "$code"' _ {}
}

# The three tools at once. Their processes end by themselves in time, and say how far they came. Every
# allocation lies by itself, so that memcheck sees a read past the end of a tensor.
sanitize() {
  local tool failed=0 folder
  if [[ " $* " == *" cpu "* ]]; then
    "$PYTHON" -m bench.sanitize --device cpu --seconds 2
    return
  fi
  folder=$(mktemp -d)
  declare -A jobs
  for tool in memcheck racecheck synccheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --kernel-name kns=flatmtl "$PYTHON" -m bench.sanitize --seconds "$((INSIDE - 35))" \
      >"$folder/$tool" 2>&1 &
    jobs[$tool]=$!
  done
  for tool in memcheck racecheck synccheck; do
    wait "${jobs[$tool]}" || failed=1
    echo "-- $tool"
    tail -n 25 "$folder/$tool"
  done
  return $failed
}

variants() {
  if "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('bench.variants') is None)"; then
    "$PYTHON" -m bench.variants "$@"
  else
    echo "bench/variants is not there: nothing to measure"
  fi
}

# What runs inside a part's limit, INSIDE seconds.
run() {
  local name=$1
  shift
  case $name in
    build) build ;;
    test) run_tests ;;
    sanitize) sanitize "$@" ;;
    variants) variants "$@" ;;
    table) "$PYTHON" -m bench.gpu table "$@" ;;
    *) "$PYTHON" -m bench.gpu "$name" --seconds "$((INSIDE - STARTING))" "$@" ;;
  esac
}

part() {
  local limit=${LIMIT:-${LIMITS[$1]}} begin=$SECONDS code=0
  echo "== $1, at most $limit s"
  INSIDE=$limit timeout -k 10 "$limit" bash bench/gpu.sh "$@" || code=$?
  ((code != 124)) || echo "$1 was stopped after $limit s"
  echo "== $1: status $code after $((SECONDS - begin)) s"
  return "$code"
}

name=${1:-all}
shift $(($# > 0))
if [[ " $PARTS all " != *" $name "* ]]; then
  echo "usage: bench/gpu.sh all|${PARTS// /|} [--device cpu --quick]" >&2
  exit 2
elif [[ -n ${INSIDE:-} ]]; then
  run "$name" "$@"
elif [[ $name != all ]]; then
  part "$name" "$@"
else
  failed=""
  for name in $PARTS; do
    if [[ " $* " == *" cpu "* && " build test variants " == *" $name "* ]]; then
      echo "== $name: not without a GPU"
    else
      part "$name" "$@" || failed+=" $name"
    fi
  done
  [[ -z $failed ]] || { echo "FAILED:$failed" >&2; exit 1; }
fi
