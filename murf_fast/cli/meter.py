"""Time and memory of calls: for the demo, the commands and the benchmarks.

Memory on a CPU is the process's resident high-water mark (the kernel's own, reset before the call), on a GPU that of
torch's allocator. A call on a GPU is waited for.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def seconds_of(call: Callable[..., Any], device: str = "cpu") -> float:
    """Wall-clock seconds of one call; its result is dropped afterwards."""
    start = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del result
    return seconds


def interleaved(
    calls: Sequence[Callable[..., Any]],
    device: str = "cpu",
    *,
    seconds: float,
    fewest: int = 3,
    most: int = 50,
    settle: bool = False,
) -> list[list[float]]:
    """Seconds of every call, taken in turns so that all see the same state of the machine.

    All have been called before. Rounds go on for ``seconds`` altogether, within the limits of their number. ``settle``:
    every timed call follows an untimed one of its own, so that none pays for memory that another gave back.
    """
    times: list[list[float]] = [[] for _ in calls]
    started = time.perf_counter()
    while len(times[0]) < fewest or (len(times[0]) < most and time.perf_counter() - started < seconds):
        for call, taken in zip(calls, times, strict=True):
            if settle:
                call()
            taken.append(seconds_of(call, device))
    return times


def observed(call: Callable[..., Any], device: str = "cpu") -> tuple[object, int | None]:
    """The result of ``call``, and the peak memory in bytes during it above that before it, its result included.

    None where there is no high-water mark to reset: on a CPU, anywhere but on Linux.
    """
    release()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return call(), None
    before = _status("VmRSS")
    result = call()
    return result, max(0, _status("VmHWM") - before)


def release() -> None:
    """Gives free memory back to the system: what malloc keeps for later would hide what the next call needs."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
