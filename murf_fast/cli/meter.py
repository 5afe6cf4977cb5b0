"""Peak memory of a call, and times of two calls side by side."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

LEAST_ROUNDS, MOST_ROUNDS = 3, 50
SECONDS = 1.0


def observed(call: Callable) -> tuple[object, int | None]:
    """The result of ``call``, and the peak resident memory during it above that before it, its result included.

    The peak is the kernel's own high-water mark, reset before the call; None where it cannot be reset (Linux can).
    """
    gc.collect()
    _return_free_memory()
    resets = _reset_peak()
    before = _status("VmRSS") if resets else 0
    result = call()
    return result, max(0, _status("VmHWM") - before) if resets else None


def interleaved(first: Callable, second: Callable) -> tuple[float, float]:
    """Median seconds of two calls, taken in turns so that both see the same state of the machine.

    Both have been called before. Rounds go on for ``SECONDS``, within the limits of their number.
    """
    times: tuple[list[float], list[float]] = ([], [])
    started = time.perf_counter()
    while len(times[0]) < LEAST_ROUNDS or (len(times[0]) < MOST_ROUNDS and time.perf_counter() - started < SECONDS):
        for call, taken in zip((first, second), times, strict=True):
            before = time.perf_counter()
            result = call()
            taken.append(time.perf_counter() - before)
            del result
    return median(times[0]), median(times[1])


def _return_free_memory() -> None:
    """Memory that malloc keeps for later would hide what the next call needs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
