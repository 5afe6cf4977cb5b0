"""The scores of pixels without defect: sorted runs of them, in memory or in a temporary file.

Every measure asks of them only how many lie at or above, and how many above, the scores of defect pixels. A sorted run
answers for all of those at once, and runs add up, so no more than one needs to be in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Pixels of a run. Counting costs two searches per defect level and run, sorting little more per pixel in a longer one.
RUN = 1 << 24
# Bytes of runs that stay in memory, unless asked otherwise.
MEMORY = 1 << 28


class SortedRuns:
    """Gathers scores and hands them on as sorted runs of about ``RUN``."""

    def __init__(self, take: Callable[[np.ndarray], None]):
        self.count = 0
        self._take = take
        self._pending: list[np.ndarray] = []
        self._held = 0

    def add(self, scores: np.ndarray) -> None:
        """``scores`` (n,) are kept until the run is full, and must not change."""
        self.count += scores.size
        self._held += scores.size
        self._pending.append(scores)
        if self._held >= RUN:
            self.close()

    def close(self) -> None:
        """Hands on what is there."""
        if self._held:
            run = np.concatenate(self._pending)
            run.sort()
            self._take(run)
            self._pending, self._held = [], 0  # not before: a disk may be full


class Store:
    """Runs to be read again: up to ``memory`` bytes stay, further ones go to a file without a name in ``folder``."""

    def __init__(self, memory: int, folder: str | Path | None):
        self._memory, self._folder = memory, folder
        if folder is not None:
            with tempfile.TemporaryFile(dir=folder):  # not late
                pass
        self._runs: list[np.ndarray] = []
        self._held = 0
        self._file: Any = None
        self._written: list[tuple[int, np.dtype, int]] = []

    def append(self, run: np.ndarray) -> None:
        if self._held + run.nbytes <= self._memory:
            self._held += run.nbytes
            self._runs.append(run)
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - open as long as this is
        end = sum(dtype.itemsize * size for _, dtype, size in self._written)
        self._file.seek(end)
        self._file.write(memoryview(run).cast("B"))  # type: ignore[arg-type]
        self._file.flush()
        self._written.append((end, run.dtype, run.size))

    def __iter__(self) -> Iterator[np.ndarray]:
        yield from self._runs
        for offset, dtype, size in self._written:
            run = np.empty(size, dtype)
            self._file.seek(offset)
            self._file.readinto(memoryview(run).cast("B"))  # type: ignore[arg-type]
            yield run


class Ranks:
    """How many of the scores lie at or above, and above, each of ``levels``, which rise."""

    def __init__(self, levels: np.ndarray):
        self.total = 0
        self.levels = levels
        self._below, self._up_to = (np.zeros(len(levels), dtype=np.int64) for _ in range(2))

    def add(self, run: np.ndarray) -> None:
        self.total += run.size
        self._below += np.searchsorted(run, self.levels, side="left")
        self._up_to += np.searchsorted(run, self.levels, side="right")

    @property
    def at_least(self) -> np.ndarray:
        return self.total - self._below

    @property
    def above(self) -> np.ndarray:
        return self.total - self._up_to
