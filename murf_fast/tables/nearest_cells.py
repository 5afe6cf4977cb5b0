"""Cells of a bank, and how near a row of a cell can be to a query.

Rows b of cell i lie about its centre c_i. For a query q and its nearest centre c_j, the triangle inequality and the
projection on the line through both centres, with u = (c_j - c_i) / |c_j - c_i|, give

    |q - b|  >=  |q - c_i| - max_b |b - c_i|            (radius)
    |q - b|  >=  (q - c_i).u - max_b (b - c_i).u        (reach of cell i towards j)

All of it is in float64, and every bound gives way by its own roundings: those of rows are relative to ``span``, those
of a squared distance from a product to the squared norms it is made of.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Entries of temporary matrices (queries x cells): 4 MB each.
ENTRIES = 1 << 19


class Rows:
    """Rows of a bank as they are searched: scaled to unit rows where asked for, without the mean, in float64."""

    def __init__(self, bank: Tensor, mean: Tensor, scale: Tensor) -> None:
        self.bank, self.mean, self.scale = bank, mean.double(), scale

    def __getitem__(self, part: Tensor | slice) -> Tensor:
        where = part.to(self.bank.device) if isinstance(part, Tensor) else part
        rows = self.bank[where].to(self.mean.device).double()
        if len(self.scale):
            rows = rows * self.scale[part][:, None]
        return rows - self.mean


class Cells(NamedTuple):
    """Rows of a bank cell by cell, and what bounds them. All but the first two are float64."""

    rows: Tensor  # (M,) int64: the bank's rows in the order of cells, rising within each
    begins: Tensor  # (N + 1,) int64: where each cell begins there, and the end
    centres: Tensor  # (N, D), of rows as they are searched: scaled and without the mean
    radii: Tensor  # (N,)
    reaches: Tensor  # (N, N): of cell i towards centre j; infinite where the two centres are one
    gaps: Tensor  # (N, N): |c_j - c_i|, or 1
    span: Tensor  # (1,): no norm of a row, centre or mean is larger than their sum, which this is


def slack(norms: Tensor | float, span: Tensor, dim: int) -> Tensor:
    """What rounding can change in a distance between rows that were scaled and centred in float64."""
    return (dim + 64) * 2.0**-50 * (norms + span)


def squared_distances(rows: Tensor, cells: Cells) -> Tensor:
    """(Q, N), of centred rows to the centres."""
    c = cells.centres
    return torch.addmm(c.square().sum(1), rows, c.T, alpha=-2).add_(rows.square().sum(1, keepdim=True))


def lower_bounds(squared: Tensor, norms: Tensor, cells: Cells) -> Tensor:
    """(Q, N): no row of a cell is nearer to the query than this. ``norms`` (Q,) are those of the queries."""
    dim = cells.centres.shape[1]
    error = (2 * dim + 96) * 2.0**-52 * (norms.square() + cells.span.square())[:, None]
    nearest, near = squared.min(1, keepdim=True)
    near = near[:, 0]
    gaps = cells.gaps[near]
    along = ((squared - nearest) / gaps).add_(gaps).div_(2).sub_(error / gaps).sub_(cells.reaches.T[near])
    around = (squared - error).clamp_(min=0).sqrt_().sub_(cells.radii)
    return torch.maximum(along, around).sub_(slack(norms, cells.span, dim)[:, None])


def first_cells(squared: Tensor, cells: Cells, k: int) -> Tensor:
    """(Q, N) bool: of every query the cells of the nearest centres that hold k rows together."""
    # No cell is empty.
    nearest = squared.topk(min(k, squared.shape[1]), dim=1, largest=False).indices
    counts = cells.begins.diff()[nearest]
    return torch.zeros_like(squared, dtype=torch.bool).scatter_(1, nearest, counts.cumsum(1) - counts < k)
