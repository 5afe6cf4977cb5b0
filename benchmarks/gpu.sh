#!/usr/bin/env bash
# Everything a GPU run needs, in one command, offline, in under nine minutes: the GPU tests, compute-sanitizer on the
# smallest case of every operation, the speed suite. A failing part is reported and does not stop the rest.
# Results: $OUT, or benchmarks/results/gpu-run. To commit them: benchmarks/report.py results.json --readme README.md
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
python="${PYTHON:-python3}"
out="${OUT:-benchmarks/results/gpu-run}"
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
  echo "gpu.sh: no CUDA device, or no torch, in $python" >&2
  exit 2
fi

mkdir -p "$out"
summary="$out/summary.txt"
: > "$summary"

note() { echo "$*" | tee -a "$summary"; }

# Without pybind11 the package installs without its CPU extension, which nothing here needs.
"$python" -m pip install -q --no-build-isolation --no-deps -e . > "$out/install.log" 2>&1 || note "install FAILED"
"$python" -m murf_fast info > "$out/info.txt" 2>&1 || nvidia-smi > "$out/info.txt" 2>&1

if timeout 180 "$python" -m pytest -q -m gpu -p no:cacheprovider tests > "$out/tests.log" 2>&1; then
  note "tests: $(tail -n 1 "$out/tests.log")"
else
  note "tests FAILED: $(tail -n 1 "$out/tests.log")"
fi

# One log for all: a remote machine may hand back only a few files.
if command -v compute-sanitizer > /dev/null; then
  for op in $("$python" benchmarks/gpu_smallest.py --list); do
    for tool in memcheck racecheck; do
      if (( SECONDS > 300 )); then note "compute-sanitizer stopped before $tool $op: out of time"; break 2; fi
      echo "=== $tool $op" >> "$out/sanitizer.log"
      if timeout 40 compute-sanitizer --tool "$tool" --error-exitcode 9 \
          "$python" benchmarks/gpu_smallest.py "$op" >> "$out/sanitizer.log" 2>&1; then
        echo "$tool $op: clean" >> "$summary"
      else
        note "$tool $op: FAILED (status $?), see sanitizer.log"
      fi
    done
  done
else
  note "compute-sanitizer is not here"
fi

# Everything ends 520 seconds after the start; the suite begins no case in its last half minute.
left=$(( 520 - SECONDS ))
timeout "$left" "$python" benchmarks/gpu_speed.py "$out/results.json" --seconds $(( left - 30 )) > "$out/speed.log" 2>&1 \
  || note "speed suite: status $?, $(grep -c FAILED "$out/speed.log") failures, see speed.log"
"$python" benchmarks/report.py "$out/results.json" --out "$out/report" > "$out/report.txt" 2>&1 || note "report FAILED"

echo "--- summary"
cat "$summary" "$out/report.txt"
