"""What the cases of a table will take: seconds from their operations and this machine, and memory that is there."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from murf_fast.cli import meter
from murf_fast.cli.tables.case import Case

LEAST = 0.02  # seconds of a case however small it is
SHARE = 0.9  # of the free memory that a case may take


class Forecast:
    """Seconds that one call of every part of a case takes.

    First by the rate of this machine's matrix products, which few models reach; then by what cases of the same kind
    took of that.
    """

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._rate = _rate(device, dtype)
        self._factors: dict[tuple[Any, ...], float] = {}

    def seconds(self, case: Case) -> float:
        least = max(LEAST, case.work.operations / self._rate)
        known = self._factors
        return least * known.get(case.kind, statistics.median(known.values()) if known else 1.0)

    def learn(self, case: Case, seconds: float) -> None:
        self._factors[case.kind] = seconds / max(LEAST, case.work.operations / self._rate)


def free_bytes(device: str) -> int | None:
    """Memory that a case may take; None where the system does not say."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def too_large(case: Case, device: str) -> str | None:
    """Why a case does not fit into memory, in words; None if it does, or if nobody knows.

    On a CPU asking for too much is the end of the process, not an error.
    """
    free = free_bytes(device)
    if free is None or case.work.bytes <= SHARE * free:
        return None
    return f"needs {gibibytes(case.work.bytes)}, {gibibytes(free)} are free"


def gibibytes(count: float) -> str:
    return f"{count / 2**30:.3g} GiB"


def _rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a matrix product of float32 on a CPU; on a GPU of the table's dtype."""
    side, kind = (4096, dtype) if device == "cuda" else (512, torch.float32)
    a = torch.ones(side, side, device=device, dtype=kind)
    meter.seconds_of(lambda: a @ a, device)
    return 2 * side**3 / max(1e-9, min(meter.seconds_of(lambda: a @ a, device) for _ in range(3)))
