#!/usr/bin/env bash
# Builds the library for this machine's GPU, tests it there, and times it: one JSON file per part, all of them in table.md.
#
#   bash benchmarks/gpu.sh [--dry-run] OUTDIR
#
# --dry-run prints what would be run, and runs and writes nothing: it needs no GPU.
# Needs a GPU, nvcc, a C++ compiler, and a Python ($PYTHON, else python3) with PyTorch, pytest, hypothesis, pybind11, CMake
# and ninja; no network. Takes less than 8 minutes: a part that fails or takes too long does not keep the others from
# running. Ends with status 0 where every part passed.
set -euo pipefail

dry_run=false
if [ "${1:-}" = --dry-run ]; then
  dry_run=true
  shift
fi
if [ $# -ne 1 ] || [ "${1#-}" != "$1" ]; then
  echo "usage: bash benchmarks/gpu.sh [--dry-run] OUTDIR" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
if $dry_run; then
  out=$1
else
  mkdir -p "$1/logs"
  rm -f "$1"/*.json "$1"/logs/* # of another run
  out=$(cd "$1" && pwd)
fi
if ! $dry_run && ! "$python" -c 'import torch' 2> /dev/null; then
  echo "gpu.sh: $python has no PyTorch; name one that has: PYTHON=/path/to/python bash benchmarks/gpu.sh OUTDIR" >&2
  exit 1
fi
python=$("$python" -c 'import sys; print(sys.executable)' || command -v "$python" || echo "$python")
# Programs that came with that Python, and those of the CUDA toolkit.
PATH="$(dirname "$python"):$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
export PATH PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" out root python
cd "$root"
# What a self-check found before is not to be believed here, and what it finds of a new build is nobody's yet.
GRADPROM_CACHE=$(mktemp -d)
trap 'rm -rf "$GRADPROM_CACHE"' EXIT
export GRADPROM_CACHE

deadline=${GRADPROM_GPU_DEADLINE:-470} # seconds from the start, all in all
$dry_run || : > "$out/parts.tsv"

note() { # NAME OUTCOME SECONDS
  if $dry_run; then
    printf '== %-12s %s\n' "$1" "$2"
    return
  fi
  printf '%s\t%s\t%s\n' "$1" "$2" "$3" >> "$out/parts.tsv"
  printf '== %-12s %-10s %4d s\n' "$1" "$2" "$3"
}

# Runs one part with its output in a log; what comes after it is given a chance whatever happens.
part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS outcome=passed code=0
  shift 2
  if $dry_run; then
    note "$name" "at most $limit s: $(printf '%q ' "$@")"
    return
  fi
  if [ $((deadline - SECONDS)) -lt "$limit" ]; then limit=$((deadline - SECONDS)); fi
  if [ "$limit" -le 0 ]; then
    outcome="no time"
  else
    # What is interrupted writes down what it has (in the background a shell would have it ignore that); what does not
    # listen is killed.
    timeout --signal=INT --kill-after=5 "$limit" env --default-signal=INT "$@" > "$out/logs/$name.log" 2>&1 || code=$?
    case $code in
      0) ;;
      124 | 137) outcome="timed out" ;;
      *) outcome=failed ;;
    esac
  fi
  note "$name" "$outcome" $((SECONDS - start))
  if [ "$outcome" != passed ] && [ "$outcome" != "no time" ]; then
    tail -n 15 "$out/logs/$name.log" | cut -c1-200 | sed 's/^/     /'
  fi
}

# shellcheck disable=SC2329 # it is `part` that runs it
build() {
  set -euo pipefail
  "$python" -c 'import pybind11' || {
    echo "the build needs the Python package pybind11, which $python does not have"
    exit 1
  }
  for program in cmake ninja nvcc c++; do
    command -v "$program" > /dev/null || {
      echo "the build needs $program, which is not on the PATH ($PATH)"
      exit 1
    }
  done
  local architecture
  architecture=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  rm -f build/gpu/CMakeCache.txt # of another Python, perhaps
  cmake -S . -B build/gpu -G Ninja -DPython_EXECUTABLE="$python" "-DGRADPROM_CUDA_ARCHITECTURES=$architecture-real" \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$root/gradprom_ext"
  cmake --build build/gpu --target _C
  "$python" -m gradprom_ext.doctor
  "$python" -m benchmarks.gpu_table build "$out"
}
export -f build

if $dry_run; then
  note machine "$python -m benchmarks.gpu_table machine $out"
elif ! "$python" -m benchmarks.gpu_table machine "$out"; then
  echo "gpu.sh: nothing was run" >&2
  exit 1
else
  note machine passed "$SECONDS"
fi

part build 60 bash -c build
if $dry_run; then declare -f build | sed 's/^/     /'; fi

self_check() { # NAME SECONDS BACKEND SECONDS-FOR-A-LINE
  part "$1" "$2" "$python" -m gradprom_ext.doctor --check --backend "$3" --device cuda:0 --time-limit "$4"
}
self_check check 25 cuda 10

# Triton's compiler needs the processor, the others the GPU: side by side. The experiments, and the packages
# that they need, stay outside (--confcutdir).
gpu_tests() { # NAME SELECTION
  # What is wrong is to be seen, and not refused before it is tried.
  part "$1" 170 env GRADPROM_SELF_CHECK=off "$python" -m pytest -m gpu -k "$2" tests/gradprom_ext --confcutdir=tests/gradprom_ext \
    -p no:cacheprovider -q --tb=short --junitxml="$out/logs/$1.xml"
}
if $dry_run; then
  self_check check-triton 160 triton 60
  gpu_tests triton triton
  gpu_tests tests "not triton"
else
  self_check check-triton 160 triton 60 &
  gpu_tests triton triton &
  gpu_tests tests "not triton"
  wait
fi

for tool in memcheck racecheck; do
  if ! $dry_run && ! command -v compute-sanitizer > /dev/null; then
    note "$tool" absent 0
    continue
  fi
  # Without PyTorch's cache every tensor is an allocation of its own, beside which nothing may be touched.
  part "$tool" 30 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m benchmarks.gpu_case
done

benchmark() { # WHAT SECONDS ROUNDS
  part "$1" "$2" "$python" -m gradprom_ext.bench --what "$1" --device cuda --rounds "$3" --json "$out/$1.json"
}
benchmark update 95 15
benchmark step 55 7

for name in tests sanitizer table; do
  if $dry_run; then
    note "$name.json" "$python -m benchmarks.gpu_table $name $out"
    continue
  fi
  "$python" -m benchmarks.gpu_table "$name" "$out" || note "$name.json" failed 0
done
if $dry_run; then
  echo "== everything would be in $out/table.md; nothing was run"
  exit 0
fi
echo "== everything is in $out/table.md"
awk -F '\t' '$2 != "passed" && $2 != "absent" { failed = 1 } END { exit failed }' "$out/parts.tsv"
