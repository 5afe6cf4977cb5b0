"""Windows of cells within a radius, on a map whose border cells stand for what lies beyond them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from murf_fast.tables._table import kept

MAX_RADIUS = 32  # cells; the table of counts is then 1.3 MB


def disk_counts(radius: int, device: torch.device) -> Tensor:
    """Logarithms of how often a window counts a cell, float32 (3, 3, radius + 1, radius + 1, radius + 1).

    Entry ``[row, column, r, a, b]`` is for a window of ``r`` cells and a cell ``a`` rows and ``b`` columns from its
    middle. ``row`` is 0 within the map, 1 for its first or last row and 2 for its only one, which stand for all the
    window's rows from there on; ``column`` likewise. -inf: not in the window.
    """
    (counts,) = kept(device, ("disk", radius), (_counts(radius, device),))
    return counts


@lru_cache(maxsize=64)
def _counts(radius: int, device: torch.device) -> Tensor:
    offset, distance = np.arange(-radius, radius + 1), np.arange(radius + 1)
    inside = offset[:, None] ** 2 + offset**2 <= distance[:, None, None] ** 2  # (r, y, x)
    # Which offsets clamp to a cell at a distance: (kind, distance, offset).
    clamped = np.stack(
        [offset == distance[:, None], offset >= distance[:, None], np.ones((radius + 1, 2 * radius + 1), bool)]
    )
    rows = np.einsum("kay,ryx->krax", clamped.astype(np.int64), inside.astype(np.int64))
    counts = np.einsum("krax,lbx->klrab", rows, clamped.astype(np.int64))
    with np.errstate(divide="ignore"):
        return torch.from_numpy(np.log(counts).astype(np.float32)).to(device)


def cells_of_axis(pixels: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of every pixel of an axis the cell that its centre lies in, int32, and its distance to that cell's centre in
    pixels, float32; of every cell and of one beyond the last the first pixel that lies there or beyond, int32.
    """
    return kept(device, ("cells", pixels, cells), _cells(pixels, cells, device))


@lru_cache(maxsize=256)
def _cells(pixels: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    twice = 2 * np.arange(pixels, dtype=np.int64) + 1
    cell = twice * cells // (2 * pixels)
    distance = (twice * cells - (2 * cell + 1) * pixels) / (2 * cells)
    first = np.searchsorted(cell, np.arange(cells + 1))

    def there(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return there(cell.astype(np.int32)), there(distance.astype(np.float32)), there(first.astype(np.int32))
