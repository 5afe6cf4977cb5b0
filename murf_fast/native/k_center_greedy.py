"""The CPU selection behind ``k_center_greedy``: codes once, then steps in pieces that can be interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import address, empty, extension, rows_of

__all__ = ["k_center_greedy"]

# Between pieces Python sees signals and progress is told.
SECONDS = 0.2


def k_center_greedy(
    features: Tensor,
    centers: Tensor,
    given: int,
    nearest: Tensor,
    met: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Fills ``centers`` (K,) int64 from ``given`` on with rows of ``features`` (N, D), and updates ``nearest`` (N,)
    float64, the squared distances to the nearest of the first ``met`` centers, fewer than ``given``."""
    with _fork.calling_thread_only():
        _select(features, centers, given, nearest, met, progress)


def _select(
    features: Tensor,
    centers: Tensor,
    given: int,
    nearest: Tensor,
    met: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    codes = _Codes(features)
    done, piece, wanted = met, 1, len(centers) - 1
    while done < wanted:
        until = min(wanted, done + piece)
        begin = time.monotonic()
        _steps(features, codes, nearest, centers, given, done, until)
        seconds = time.monotonic() - begin
        piece = max(1, min(2 * piece, int(piece * SECONDS / max(seconds, 1e-6))))
        done = until
        if progress is not None:
            progress(max(given, done + 1), wanted + 1)


class _Codes:
    """Rows as eight-bit codes around their mean, with scales, squared norms and errors; see csrc/types.h."""

    def __init__(self, features: Tensor) -> None:
        rows, dim = features.shape
        self.mean = sum(part.sum(0, dtype=torch.float64) for part in features.split(4096)).div(rows).float()
        self.codes = empty((rows, (dim + 63) // 64 * 64), torch.int8)
        self.numbers = empty((3, rows), torch.float64)
        self.encode(features, 0, rows)

    def encode(self, features: Tensor, begin: int, end: int) -> None:
        """Of the rows ``begin`` to ``end``."""
        some = features[begin:end]
        extension.k_center_encode(
            x=rows_of(some),
            mean=address(self.mean, torch.float32, some.shape[1]),
            codes=self.native(some, begin),
            threads=_fork.threads(),
        )

    def native(self, features: Tensor, begin: int = 0) -> Any:
        """For the kernels, which walk the codes of these rows, from ``begin`` on."""
        (rows, dim), width = features.shape, self.codes.shape[1]
        if width < dim:
            raise ValueError(f"murf_fast: codes of {width} columns stand for no rows of {dim}")
        scales, squared_norms, errors = self.numbers[:, begin:]
        return extension.KCenterCodes(
            data=address(self.codes[begin:], torch.int8, rows * width),
            stride=width,
            scales=address(scales, torch.float64, rows),
            squared_norms=address(squared_norms, torch.float64, rows),
            errors=address(errors, torch.float64, rows),
        )


class Visited:
    """Rows that meet centers which need not be among them: what each shard does of a selection over several.

    Args:
        rows: (N, D), copied; 0 rows are allowed.
        nearest: (N,) float64: squared distances to the nearest of the centers met before; copied.

    Attributes:
        nearest: As it is by now.

    Memory: the copy, 1 byte per value and 32 bytes per row.
    """

    ROOM = 64  # centers that are met in one go

    def __init__(self, rows: Tensor, nearest: Tensor) -> None:
        self._count = len(rows)
        # Kernels know a center by its number among the rows, so visitors sit behind them.
        self._rows = empty((len(rows) + self.ROOM, rows.shape[1]), rows.dtype)
        self._rows[: len(rows)], self._rows[len(rows) :] = rows, 0
        self._squared = torch.zeros(len(self._rows), dtype=torch.float64, device="cpu")
        self.nearest = self._squared[: len(rows)].copy_(nearest)
        with _fork.calling_thread_only():
            self._codes = _Codes(self._rows)

    def meet(self, centers: Tensor) -> None:
        """Takes in centers (n, D) of the rows' dtype."""
        for some in centers.split(self.ROOM) if self._count else ():
            begin, end = self._count, self._count + len(some)
            rows, numbers = self._rows[:end], torch.arange(begin, end + 1, dtype=torch.int64, device="cpu")
            rows[begin:] = some
            with _fork.calling_thread_only():
                self._codes.encode(rows, begin, end)
                # All are given but the one behind the last, which the kernel writes its farthest row to.
                _steps(rows, self._codes, self._squared[:end], numbers, len(some), 0, len(some))


def _steps(features: Tensor, codes: _Codes, nearest: Tensor, centers: Tensor, given: int, begin: int, end: int) -> None:
    """Steps ``begin`` to ``end``: takes in ``centers[step]`` and, beyond the ``given`` ones, finds the next."""
    extension.k_center_steps(
        x=rows_of(features),
        codes=codes.native(features),
        nearest=address(nearest, torch.float64, len(features)),
        centers=address(centers, torch.int64, max(end + 1, given)),
        given=given,
        begin=begin,
        end=end,
        threads=_fork.threads(),
    )
