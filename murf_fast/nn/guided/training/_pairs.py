"""Squared distances of all pairs of points, a block at a time, and their median."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1024  # points: a block of distances is 4 MiB, and its product with the points runs at the rate of large ones
_DIGIT = 16  # bits


def blocks(count: int) -> list[slice]:
    return [slice(i, min(i + BLOCK, count)) for i in range(0, count, BLOCK)]


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(m, n) of points (m, C), (n, C), which should lie about the origin: a product rounds as their squares do."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(squares, a, b.mT, alpha=-2).clamp_(min=0)


def median_squared_distance(x: Tensor) -> Tensor:
    """Of all pairs of different points (m, C), the lower of two medians; a scalar.

    Exact and without the distances in memory: numbers that are not negative are in the order of their bits, which are
    found 16 at a time, from the highest, by counting. Blocks are made again for every 16 bits, by the same product.
    """
    bits, whole = (torch.int32, 32) if x.dtype == torch.float32 else (torch.int64, 64)
    count = len(x) * (len(x) - 1) // 2
    left = torch.full((1,), (count - 1) // 2, dtype=torch.int64, device=x.device)  # smaller ones in what is left
    found = torch.zeros_like(left)
    for shift in range(whole - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(2**_DIGIT, dtype=torch.int64, device=x.device)
        for block, upper in _blocks_above_diagonal(x):
            number = block.view(bits).to(torch.int64)
            candidates = upper if shift == whole - _DIGIT else upper & (number >> (shift + _DIGIT) == found)
            digits = (number >> shift) & (2**_DIGIT - 1)
            counts.index_add_(0, digits.flatten(), candidates.flatten().to(torch.int64))
        below = counts.cumsum(0)
        digit = torch.searchsorted(below, left + 1)
        left = left - (below - counts).index_select(0, digit)
        found = (found << _DIGIT) | digit
    return found.to(bits).view(x.dtype)[0]


def _blocks_above_diagonal(x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of distances, and which of them are of i < j."""
    index = torch.arange(len(x), device=x.device)
    for rows in blocks(len(x)):
        for columns in blocks(len(x)):
            if columns.stop > rows.start + 1:
                # The absolute value of a zero has no sign, which would be its highest bit.
                yield squared_distances(x[rows], x[columns]).abs_(), index[rows, None] < index[columns]
