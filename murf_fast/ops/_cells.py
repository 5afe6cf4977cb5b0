"""The partition of a bank into cells: Lloyd's k-means on a sample, with this library's own search.

A few iterations do: cells only have to be small, not optimal. The search by this library runs where the bank is
searched, and asks for no other package.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from murf_fast.tables.nearest_cells import Cells, Rows, slack

ITERATIONS = 4
# Rows of the sample per cell.
SAMPLE = 64
# Rows that "auto" gives a cell: smaller ones prune more, and cost more to walk than they save.
ROWS_PER_CELL = 512
MOST_CELLS = 1024
# A bank with fewer rows is searched in less time than its cells are looked up.
FEW_ROWS = 8192
# Entries of a block of rows in float64: 8 MB.
ENTRIES = 1 << 20

Nearest = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def count_of(cells: int | str, rows: int) -> int:
    """How many cells a bank gets; 0 for none."""
    if cells == "auto":
        return 0 if rows < FEW_ROWS else min(MOST_CELLS, rows // ROWS_PER_CELL)
    return min(int(cells), rows)


def partition(bank: Tensor, mean: Tensor, scale: Tensor, count: int, nearest: Nearest) -> Cells:
    """``count`` cells, or fewer where some would be empty."""
    rows = Rows(bank, mean, scale)
    centres = _centres(rows, len(bank), count, nearest)
    owner = assigned(rows, len(bank), centres, nearest)
    held = (torch.bincount(owner, minlength=len(centres)) > 0).nonzero().flatten()
    tour = held[_tour(centres[held])]
    place = torch.empty(len(centres), dtype=torch.int64, device=tour.device)
    place[tour] = torch.arange(len(tour), dtype=torch.int64, device=tour.device)
    return arranged(rows, place[owner], centres[tour].double())


def _tour(centres: Tensor) -> Tensor:
    """An order in which centres follow near ones: always the nearest of those that are left.

    Queries of neighbouring cells share tiles, and cells that lie beside one another share blocks.
    """
    gaps = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist").cpu().numpy()
    order, left = [0], np.ones(len(gaps), dtype=bool)
    for _ in range(len(gaps) - 1):
        left[order[-1]] = False
        order.append(int(np.where(left, gaps[order[-1]], np.inf).argmin()))
    return torch.tensor(order, dtype=torch.int64, device=centres.device)


def grown(bank: Tensor, mean: Tensor, scale: Tensor, cells: Cells, nearest: Nearest) -> Cells:
    """``cells`` and the rows of ``bank`` that they do not have yet, the last ones."""
    rows, first = Rows(bank, mean, scale), len(cells.rows)
    owner = torch.empty_like(cells.rows)
    owner[cells.rows] = torch.repeat_interleave(cells.begins.diff())
    new = assigned(rows, len(bank), cells.centres, nearest, first)
    order = new.argsort(stable=True)
    begins = torch.nn.functional.pad(torch.bincount(new, minlength=len(cells.centres)).cumsum(0), (1, 0))
    more = _bounded(rows, order + first, begins, cells.centres)
    owner = torch.cat([owner, new])
    counts = torch.bincount(owner, minlength=len(cells.centres))
    return Cells(
        owner.argsort(stable=True),
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        cells.centres,
        torch.maximum(cells.radii, more.radii),
        torch.maximum(cells.reaches, more.reaches),
        cells.gaps,
        torch.maximum(cells.span, more.span),
    )


def assigned(rows: Rows, count: int, centres: Tensor, nearest: Nearest, first: int = 0) -> Tensor:
    """The nearest centre of every row from ``first`` on."""
    step = max(1, ENTRIES // centres.shape[1])
    parts = [
        nearest(rows[begin : min(begin + step, count)].float(), centres.float())[1][:, 0]
        for begin in range(first, count, step)
    ]
    return torch.cat(parts)


def arranged(rows: Rows, owner: Tensor, centres: Tensor) -> Cells:
    """Cells of rows that have been given to centres, none of which is without any."""
    order = owner.argsort(stable=True)
    begins = torch.nn.functional.pad(torch.bincount(owner, minlength=len(centres)).cumsum(0), (1, 0))
    return _bounded(rows, order, begins, centres)


def _bounded(rows: Rows, order: Tensor, begins: Tensor, centres: Tensor) -> Cells:
    squares = centres.square().sum(1)
    gaps = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
    same = gaps <= 2.0**-40 * squares.max().sqrt()
    gaps = gaps.masked_fill(same, 1.0)
    radii, reaches, largest = _extents(rows, order, begins.tolist(), centres, gaps)
    span = (largest + rows.mean.norm() + squares.max().sqrt()).reshape(1)
    give = slack(0.0, span, centres.shape[1])
    return Cells(order, begins, centres, radii + give, (reaches + give).masked_fill(same, torch.inf), gaps, span)


def _extents(rows: Rows, order: Tensor, begins: list[int], centres: Tensor, gaps: Tensor) -> tuple[Tensor, ...]:
    """Radii, reaches and the largest norm of the rows."""
    radii, reaches = torch.zeros_like(gaps[0]), torch.full_like(gaps, -torch.inf)
    largest = radii.new_zeros(())
    step = max(1, ENTRIES // max(centres.shape))
    for i, (first, end) in enumerate(itertools.pairwise(begins)):
        directions = (centres - centres[i]) / gaps[i][:, None]
        for begin in range(first, end, step):
            own = rows[order[begin : min(begin + step, end)]]
            largest = torch.maximum(largest, own.square().sum(1).max().sqrt())
            own = own - centres[i]
            radii[i] = torch.maximum(radii[i], own.square().sum(1).max().sqrt())
            reaches[i] = torch.maximum(reaches[i], (own @ directions.T).amax(0))
    return radii, reaches, largest


def _centres(rows: Rows, total: int, count: int, nearest: Nearest) -> Tensor:
    """(count, D) float32. The draws are the same in every process."""
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randperm(total, generator=generator, dtype=torch.int64, device="cpu")[: count * SAMPLE]
    step = max(1, ENTRIES // rows.bank.shape[1])
    sample = torch.cat([rows[part.sort().values].float() for part in drawn.to(rows.mean.device).split(step)])
    chosen = torch.randperm(len(sample), generator=generator, dtype=torch.int64, device="cpu")[:count].to(sample.device)
    centres = sample[chosen]
    for _ in range(ITERATIONS):
        own = nearest(sample, centres)[1][:, 0]
        members = torch.bincount(own, minlength=count)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, own, sample)
        centres = torch.where(members > 0, sums / members.clamp(min=1), centres)
    return centres
