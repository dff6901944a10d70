#!/usr/bin/env bash
# Builds the library for this machine's GPU, tests it there, and times it: one JSON file per part, all of them in table.md.
#
#   bash benchmarks/gpu.sh OUTDIR
#
# Needs a GPU, nvcc, a C++ compiler, and a Python ($PYTHON, else python3) with PyTorch, pytest, hypothesis, pybind11, CMake
# and ninja; no network. Takes less than 8 minutes: a part that fails or takes too long does not keep the others from
# running. Ends with status 0 where every part passed.
set -euo pipefail

if [ $# -ne 1 ]; then
  echo "usage: bash benchmarks/gpu.sh OUTDIR" >&2
  exit 2
fi
mkdir -p "$1/logs"
rm -f "$1"/*.json "$1"/logs/* # of another run
out=$(cd "$1" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
if ! "$python" -c 'import torch' 2> /dev/null; then
  echo "gpu.sh: $python has no PyTorch; name one that has: PYTHON=/path/to/python bash benchmarks/gpu.sh OUTDIR" >&2
  exit 1
fi
python=$("$python" -c 'import sys; print(sys.executable)')
# Programs that came with that Python, and those of the CUDA toolkit.
PATH="$(dirname "$python"):$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
export PATH PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" out root python
cd "$root"

deadline=470 # seconds from the start, all in all
: > "$out/parts.tsv"

note() { # NAME OUTCOME SECONDS
  printf '%s\t%s\t%s\n' "$1" "$2" "$3" >> "$out/parts.tsv"
  printf '== %-10s %-10s %4d s\n' "$1" "$2" "$3"
}

# Runs one part with its output in a log; what comes after it is given a chance whatever happens.
part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS outcome=passed code=0
  shift 2
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

if ! "$python" -m benchmarks.gpu_table machine "$out"; then
  echo "gpu.sh: nothing was run" >&2
  exit 1
fi
note machine passed "$SECONDS"

part build 60 bash -c build

# Triton's compiler needs the processor, the others the GPU: two halves side by side. The experiments, and the packages
# that they need, stay outside (--confcutdir).
gpu_tests() { # NAME SELECTION
  part "$1" 180 "$python" -m pytest -m gpu -k "$2" tests/gradprom_ext --confcutdir=tests/gradprom_ext \
    -p no:cacheprovider -q --tb=short --junitxml="$out/logs/$1.xml"
}
gpu_tests triton triton &
gpu_tests tests "not triton"
wait

for tool in memcheck racecheck; do
  if ! command -v compute-sanitizer > /dev/null; then
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
  "$python" -m benchmarks.gpu_table "$name" "$out" || note "$name.json" failed 0
done
echo "== everything is in $out/table.md"
awk -F '\t' '$2 != "passed" && $2 != "absent" { failed = 1 } END { exit failed }' "$out/parts.tsv"
