"""The speed suite on a GPU: CUDA events on a cold L2, and replays of a CUDA graph. Writes the JSON of report.py.

    python benchmarks/gpu_speed.py OUT.json [--only OP] [--seconds 200]
    python benchmarks/gpu_speed.py OUT.json --dry-run      # tiny shapes in Triton's interpreter: no speeds

A case whose result is wrong is reported and not timed; a case that raises is reported and does not stop the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

if "--dry-run" in sys.argv:
    # Both are read when murf_fast is imported or called.
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["MURF_FAST_BACKEND"] = "triton"

import torch
from machine import describe
from measure import WrongResult, check
from registry import Case, cases, scale_down

from murf_fast.cli.meter import observed

REPEATS = 25


class Clock:
    """Milliseconds of a call on the current stream, the caches flushed before it."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        if self.cuda:
            size = torch.cuda.get_device_properties(0).L2_cache_size
            self.flush = torch.empty(max(4 * size, 64 << 20), dtype=torch.int8, device=device)

    def __call__(self, function) -> dict:
        for _ in range(3 if self.cuda else 0):
            function()
        times = [self._once(function) for _ in range(REPEATS if self.cuda else 1)]
        ordered = sorted(times)
        return {
            "median_s": statistics.median(ordered),
            "p20_s": ordered[len(ordered) // 5],
            "p80_s": ordered[-1 - len(ordered) // 5],
            "rounds": len(ordered),
        }

    def _once(self, function) -> float:
        if not self.cuda:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The flush also keeps the GPU busy while the host enqueues the call, so that no launch gap is timed.
        self.flush.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def replayed(clock: Clock, function) -> float | None:
    """Median seconds of a graph replay; None where the call cannot be captured (autograd, host syncs)."""
    graph = torch.cuda.CUDAGraph()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:
        return None
    return clock(graph.replay)["median_s"]


def measure(case: Case, device: str, clock: Clock) -> dict:
    contenders = case.build(device, case.dtype)
    error = check(case, contenders)
    functions = {"murf_fast": contenders.ours, **contenders.others}
    if device == "cpu":
        functions = {name: f for name, f in functions.items() if "compile" not in name}
    measured = {}
    for name, function in functions.items():
        measured[name] = {**clock(function), "peak_bytes": observed(function, device)[1]}
        if device == "cuda" and "compile" not in name:
            measured[name]["replay_s"] = replayed(clock, function)
    return {
        "op": case.op,
        "case": case.name + (f", {str(case.dtype).removeprefix('torch.')}" if case.dtype != torch.float32 else ""),
        "dtype": str(case.dtype).removeprefix("torch."),
        "error": error,
        "bytes": contenders.result_bytes,
        "operations": contenders.operations,
        "contenders": measured,
        # The goals of the CPU suites are for CPUs; on a GPU the write rate is the goal of the copy-like operation.
        "targets": [{"against": t.against, "ratio": t.ratio} for t in case.targets if case.devices == ("cuda",)],
        "write_target": 0.85 if case.op == "upsample_concat" else None,
        "memory_target": case.memory_target,
        "less_memory": case.less_memory,
        "beside": None,
        "facts": case.facts,
    }


def ceilings(device: str) -> dict:
    """Write, copy (read plus written) and bfloat16 matrix-product rates of this GPU."""
    clock, n = Clock(device), (1 << 28 if device == "cuda" else 1 << 10)
    x, y = torch.zeros(n, device=device), torch.zeros(n, device=device)
    side = 8192 if device == "cuda" else 32
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {
        "write_bytes_per_s": 4 * n / clock(lambda: x.fill_(1.0))["median_s"],
        "copy_bytes_per_s": 8 * n / clock(lambda: y.copy_(x))["median_s"],
        "gemm_flops_per_s": 2 * side**3 / clock(lambda: a @ b)["median_s"],
    }


def variants(case: Case) -> list[Case]:
    """The case as it stands and, unless it names its dtype, in bfloat16."""
    if "cuda" not in case.devices:
        return []
    if case.dtype != torch.float32 or any(c.op == case.op and c.dtype == torch.bfloat16 for c in cases()):
        return [case]
    return [case, dataclasses.replace(case, dtype=torch.bfloat16)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help="one operation")
    parser.add_argument("--seconds", type=float, default=1e9, help="no case is begun after so many")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    device = "cpu" if arguments.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu_speed: no CUDA device here", file=sys.stderr)
        return 2
    if arguments.dry_run:
        scale_down(0.02)
    # Ours computes float32 in float32; so must the baselines, whose error is also the budget.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    started, results, failed = time.monotonic(), [], []
    report = {"machine": describe(device), "ceilings": ceilings(device), "cases": results, "failed": failed}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    clock = Clock(device)
    for case in [v for c in cases() for v in variants(c)]:
        if arguments.only not in (None, case.op):
            continue
        # The interpreter has no bfloat16 arithmetic.
        if arguments.dry_run and case.dtype == torch.bfloat16:
            continue
        label = f"{case.id} ({case.dtype})"
        if time.monotonic() - started > arguments.seconds:
            failed.append(f"{label}: not begun, out of time")
            continue
        try:
            results.append(measure(case, device, clock))
        except WrongResult as error:
            failed.append(f"wrong result, not timed: {error}")
        except Exception as error:  # a broken kernel must not hide the others
            failed.append(f"{label}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        # After every case: what was measured survives whatever happens next.
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    for line in failed:
        print(f"FAILED {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
