#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds, tests, sanitizes and measures, in under 10 minutes.
#
#   bench/gpu.sh all                            every part, each stopped at the end of its time; nothing
#                                               but the build where that fails
#   bench/gpu.sh PART                           one: build test sanitize ceiling kernels solvers
#                                               aggregate steps variants table
#   LIMIT=300 bench/gpu.sh PART                 one, with so many seconds
#   bench/gpu.sh PART|all --device cpu --quick  no GPU: all but the CUDA calls, and but build, test and
#                                               variants, which are nothing without a GPU
#
# Needs a torch built for CUDA, nvcc and compute-sanitizer on the PATH, and in the environment of PYTHON
# setuptools, ninja, pybind11, numpy and pytest. torchjd is compared with where it is installed. Nothing
# is installed; but `build` overwrites this checkout's flatmtl/*.so with libraries for this GPU's
# architecture alone. docs/gpu.md says what the parts do and how to read the table.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
PARTS="build test sanitize ceiling kernels solvers aggregate steps variants table"
# seconds; with ENDING for each, together less than 10 minutes
declare -A LIMITS=([build]=115 [test]=90 [sanitize]=70 [ceiling]=20 [kernels]=110 [solvers]=40
  [aggregate]=40 [steps]=50 [variants]=30 [table]=14)
ENDING=2    # seconds that a part which was told to stop has to do so
STARTING=12 # seconds of a limit that importing torch and ending in order may take

# The variants are compiled beside the package: their own part is short. Where that fails or takes too
# long, their part says so.
build() {
  local own beside
  own=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  timeout "$((INSIDE - STARTING))" "$PYTHON" -m bench.variants.library "${own/./}" &
  beside=$!
  # this device alone: four architectures take four times as long
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$own} FLATMTL_CUDA=1 \
    "$PYTHON" setup.py -q build_ext --inplace
  "$PYTHON" -m bench.gpu.machine
  wait "$beside" || echo "the variants were not built: status $?"
}

# A process a file, several at once; a file whose imports are missing here fails by itself. Tests that
# need a GPU are skipped without one: that is no pass.
run_tests() {
  local said
  "$PYTHON" -m bench.gpu.machine
  said=$(mktemp)
  grep -lE 'mark\.gpu|def test\w*\(.*\b(body|device)\b' tests/test_*.py |
    PYTHON=$PYTHON xargs -P 12 -I{} bash -c '
      code=0
      log=$("$PYTHON" -m pytest "$1" -m gpu -q -p no:cacheprovider --tb=short 2>&1) || code=$?
      ((code != 5)) || exit 0 # none of its tests is marked
      ((code == 0)) || tail -n 60 <<<"$log"
      echo "$1: $(tail -n 1 <<<"$log")"
      exit "$code"' _ {} | tee "$said"
  grep -qE '[0-9]+ passed' "$said" || { echo "no test was run" >&2; return 1; }
}

# The three tools at once. Their processes end by themselves in time, and say how far they came. Every
# allocation lies by itself, so that memcheck sees a read past the end of a tensor.
sanitize() {
  local tool failed=0 folder
  if without_gpu "$@"; then
    "$PYTHON" -m bench.sanitize --device cpu --seconds 5
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

without_gpu() { [[ " $* " == *" --device cpu "* || " $* " == *" --device=cpu "* ]]; }

# What runs inside a part's limit, INSIDE seconds.
run() {
  local name=$1 seconds=$((INSIDE - STARTING))
  shift
  case $name in
    build) build ;;
    test) run_tests ;;
    sanitize) sanitize "$@" ;;
    variants) "$PYTHON" -m bench.variants --seconds "$seconds" "$@" ;;
    table) "$PYTHON" -m bench.gpu table "$@" ;;
    *) "$PYTHON" -m bench.gpu "$name" --seconds "$seconds" "$@" ;;
  esac
}

part() {
  local limit=${LIMIT:-${LIMITS[$1]}} begin=$SECONDS code=0
  if without_gpu "$@" && [[ " build test variants " == *" $1 "* ]]; then
    echo "== $1: not without a GPU"
    return
  fi
  echo "== $1, at most $limit s"
  INSIDE=$limit timeout -k "$ENDING" "$limit" bash bench/gpu.sh "$@" || code=$?
  # 137: it was told to stop and did not
  ((code != 124 && code != 137)) || echo "$1 was stopped after $limit s"
  echo "== $1: status $code after $((SECONDS - begin)) s"
  return "$code"
}

name=${1:-all}
shift $(($# > 0))
if [[ " $PARTS all " != *" $name "* ]]; then
  echo "usage: bench/gpu.sh all|${PARTS// /|} [--device cpu --quick]" >&2
  exit 2
elif [[ -n ${INSIDE:-} ]]; then
  # told to stop: not before what it runs, which would be left behind to disturb the next part
  trap 'wait; exit 143' TERM
  run "$name" "$@"
elif [[ $name != all ]]; then
  part "$name" "$@"
else
  failed=""
  for name in $PARTS; do
    part "$name" "$@" || failed+=" $name"
    if [[ $failed == " build" ]]; then
      echo "FAILED: build; the rest would be of an older library, and was not run" >&2
      exit 1
    fi
  done
  [[ -z $failed ]] || { echo "FAILED:$failed" >&2; exit 1; }
fi
