"""Seconds of calls on a GPU: CUDA events around a call, on cold caches and without the host's launch gaps.

Beside :mod:`murf_fast.cli.meter`, for the benchmarks and the tables.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

REPEATS = 25
SECONDS = 3.0  # of one contender: a slow one is called less often


class Clock:
    """Seconds of a call on the current stream, with cold caches, and without the time in which the host enqueues it."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            size = max(4 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size, 64 << 20)
            self.other = torch.zeros(size // 4, device=device)
            self.largest = torch.zeros((), device=device)
            self.cycles_per_s = 1e9
            self.cycles_per_s = 1e8 / self._between(lambda: torch.cuda._sleep(100_000_000), 0.0)

    def __call__(self, function: Callable[..., Any], seconds: float = SECONDS) -> dict[str, Any]:
        if not self.cuda:
            start = time.perf_counter()
            function()
            return summary([time.perf_counter() - start])
        function()  # compiles, fills caches
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = function()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        whole = time.perf_counter() - start
        del result
        rounds = int(min(REPEATS, max(3, seconds / (whole + host))))
        return summary([self._between(function, host) for _ in range(rounds)]) | {"host_s": host}

    def _between(self, function: Callable[..., Any], host: float) -> float:
        """The time between two events around the call."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Read, not written: lines that must be written back would be paid for by the call.
        torch.amax(self.other, 0, out=self.largest)
        # The GPU waits until the host has enqueued everything, so that no launch gap lies between the events.
        torch.cuda._sleep(int((2 * host + 50e-6) * self.cycles_per_s))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile, and how many there are."""
    ordered = sorted(times)
    return {
        "median_s": statistics.median(ordered),
        "p20_s": ordered[len(ordered) // 5],
        "p80_s": ordered[-1 - len(ordered) // 5],
        "rounds": len(ordered),
    }
