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
        mean = sum(part.sum(0, dtype=torch.float64) for part in features.split(4096)).div(rows).float()
        self.codes = empty((rows, (dim + 63) // 64 * 64), torch.int8)
        self.numbers = empty((3, rows), torch.float64)
        extension.k_center_encode(
            x=rows_of(features),
            mean=address(mean, torch.float32, dim),
            codes=self.native(features),
            threads=_fork.threads(),
        )

    def native(self, features: Tensor) -> Any:
        """For the kernels, which walk the codes of these rows."""
        (rows, dim), width = features.shape, self.codes.shape[1]
        if width < dim:
            raise ValueError(f"murf_fast: codes of {width} columns stand for no rows of {dim}")
        scales, squared_norms, errors = self.numbers
        return extension.KCenterCodes(
            data=address(self.codes, torch.int8, rows * width),
            stride=width,
            scales=address(scales, torch.float64, rows),
            squared_norms=address(squared_norms, torch.float64, rows),
            errors=address(errors, torch.float64, rows),
        )


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
