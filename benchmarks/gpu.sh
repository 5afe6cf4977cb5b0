#!/usr/bin/env bash
# Everything a GPU run needs, in one command, offline and without a build, made for a machine that is lent for minutes:
# the kernels compiled, checked, timed and sanitized, in that order, each with its own time limit. See gpu.py --help.
# Results: $OUT, or benchmarks/results/gpu-run. To commit them: benchmarks/report.py results.json
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
