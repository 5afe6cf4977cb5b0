"""A process of gpu.py: reads units of work from its input, a line of JSON each, and answers with lines of JSON.

The last answer about a unit is its ``done``; where that says that the context is dead, the process is of no more use
and ends by itself.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import gpu_context
import gpu_speed
import torch
from registry import scale_down, smallest_calls


def main() -> None:
    # Whatever prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(kind: str, **message) -> None:
        print(json.dumps({"kind": kind, **message}), file=answers, flush=True)

    dry = "--dry-run" in sys.argv
    device = "cpu" if dry else "cuda"
    if dry:
        scale_down(0.02)
    # Ours computes float32 in float32; so must the baselines, whose error is also the budget.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    clock = gpu_speed.Clock(device)
    for line in sys.stdin:
        unit = json.loads(line)
        print(f"=== {line.strip()}", file=sys.stderr, flush=True)
        dead = None
        try:
            work(unit, device, clock, say)
        except Exception as error:  # a broken kernel must not hide the others
            say("error", text=first_line(error))
            dead = "a failed capture" if isinstance(error, gpu_speed.CaptureFailed) else None
        if gpu_context.is_dead():
            dead = "the CUDA context is dead"
        say("done", dead=dead)
        if dead:
            os._exit(3)  # what is left to clean up may need the context
        gc.collect()
        if not dry:
            torch.cuda.empty_cache()


def work(unit: dict, device: str, clock, say) -> None:
    gpu_context.plant(unit.get("op", ""))
    if unit["do"] == "smallest":
        smallest_calls()[unit["op"]](device)
        if device == "cuda":
            torch.cuda.synchronize()
        say("ran")
    elif unit["do"] == "call":
        gpu_speed.compile_all(gpu_speed.case_of(unit), device)
    elif unit["do"] == "ceilings":
        gpu_speed.surroundings(device, clock, say)
    else:
        gpu_speed.measure(gpu_speed.case_of(unit), device, clock, unit["compiled"], say)


def first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


if __name__ == "__main__":
    main()
