"""Microseconds of the host's time in a call of every operation on the Triton backend, without the launches themselves.

A GPU waits for its host wherever a call takes longer than its kernels; the goal is 60 us a call at most. No GPU is
needed: the calls of ``calls/overhead.py`` run on CPU tensors, and what they would hand to Triton's launcher is counted
and dropped. Not in the figures is the launcher's own time. Torch's small operations run on the CPU in them, where a
GPU's host would only enqueue them.

python benchmarks/host_time.py > benchmarks/results/offline/host_time.md
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "calls"))

import overhead
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from murf_fast import backends, kernels  # noqa: F401  before the variable below, which would make them interpreted

GOAL = 60.0
CALLS, ROUNDS = 50, 9
WAITS = ("nearest_distance",)


class NoDriver:
    """As much of Triton's driver as launchers ask for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Launches:
    """Counts what is launched, and launches nothing."""

    def __init__(self) -> None:
        self.count = 0

    def install(self) -> None:
        def run(kernel, *arguments, **options) -> None:
            self.count += 1

        JITFunction.run = run


def microseconds(call: Callable[[], object]) -> float:
    """Median over rounds of the mean of some calls; of the processor, which others may want, too."""
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        times.append((time.process_time() - start) / CALLS)
    return 1e6 * statistics.median(times)


def main() -> None:
    # What lets the operations hand CPU tensors to Triton.
    os.environ["TRITON_INTERPRET"] = "1"
    driver.set_active(NoDriver())
    torch.set_num_threads(1)
    launches, inputs = Launches(), overhead.Inputs.made("cpu", torch.float32)
    launches.install()
    print(f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}.\n")
    print(f"| operation | launches | host time beside them, us | goal {GOAL:.0f} |\n|---|---|---|---|")
    with backends.use_backend("triton"), torch.no_grad():
        for name, operation in overhead.OPERATIONS.items():
            if name in WAITS:
                print(f"| `{name}` | | looks at what its kernels found | |")
                continue
            operation(inputs)
            launches.count = 0
            operation(inputs)
            count, taken = launches.count, microseconds(lambda operation=operation: operation(inputs))
            print(f"| `{name}` | {count} | {taken:.0f} | {'reached' if taken <= GOAL else 'missed'} |")


if __name__ == "__main__":
    main()
