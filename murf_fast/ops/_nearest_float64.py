"""The search behind ``nearest_distance`` in float64, on any device: blocks of products, candidates, differences.

As in float32, a block of a matrix product is reduced to the rows that can still be among the k nearest by a bound on
the product's error, and those are scored by direct differences. The product is in float64 too, so the bound is a few
thousand roundings and nearly all candidates are neighbours.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

# A block of products, the rows of a block, and those of one go of direct differences: 8 MB each.
VALUES = 1 << 20
QUERIES = 1024
# Candidates that wait to be scored, beside the k of every query.
WAITING = 1 << 17
# Beyond this, squares are near the end of float64.
LARGEST_SQUARED_NORM = 1e300


def search(query: Tensor, bank: Tensor, k: int, metric: str, op: str, distances: Tensor, indices: Tensor) -> None:
    """Writes ``distances`` (Q, k), computed in float64, and ``indices`` (Q, k). ``bank`` may lie in host memory; its
    blocks go to the queries.
    """
    cosine, ip = metric == "cosine", metric == "ip"
    step = max(1, min(VALUES // bank.shape[1], VALUES // min(QUERIES, len(query))))
    # Common to all rows, or nearly: products of differences from it have small errors.
    center = _rows(bank[:step], query.device, cosine).mean(0)
    if ip:
        center.zero_()
    for first in range(0, len(query), QUERIES):
        part = slice(first, first + QUERIES)
        rows = _rows(query[part], query.device, cosine)
        if not _are_fine(rows):
            _refuse(op, "query", query[part], first, cosine)
        found = _Search(rows, bank, k, metric)
        for begin in range(0, len(bank), step):
            block = bank[begin : begin + step]
            if not found.look(begin, _rows(block, query.device, cosine), center):
                _refuse(op, "bank", block, begin, cosine)
        squared, indices[part] = found.result()
        if ip:
            distances[part] = -squared
        else:
            distances[part] = {"l2": squared.sqrt(), "l2sq": squared, "cosine": squared / 2}[metric]


def _are_fine(rows: Tensor) -> bool:
    return bool(rows.square().sum(1).max() <= LARGEST_SQUARED_NORM)


def _refuse(op: str, name: str, x: Tensor, first: int, cosine: bool) -> NoReturn:
    """Says which rows have no squares in float64 or, for cosine distances, no direction."""
    wrong = ~x.isfinite().all(1) if cosine else ~(x.double().square().sum(1) <= LARGEST_SQUARED_NORM)
    if cosine and not bool(wrong.any()):
        zero = ((x == 0).all(1).nonzero().flatten()[:5] + first).tolist()
        raise ValueError(f'murf_fast.{op}: metric="cosine" needs nonzero rows, `{name}` has {zero}')
    rows = (wrong.nonzero().flatten() + first).tolist()
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    limit = "" if cosine else " with norms up to 1e150"
    raise ValueError(f"murf_fast.{op}: `{name}` must be finite{limit}, rows {rows[:5]}{more} are not")


def _unit(x: Tensor) -> Tensor:
    """Rows of norm one, of rows of any finite size: the largest entry is brought to one first."""
    x = x / x.abs().amax(1, keepdim=True)
    return x / x.square().sum(1, keepdim=True).sqrt()


def _rows(x: Tensor, device: torch.device, cosine: bool) -> Tensor:
    x = x.to(device=device, dtype=torch.float64)
    return _unit(x) if cosine else x


class _Search:
    """What is known about some queries: the k smallest upper bounds, rows that wait to be scored, the k scored best."""

    def __init__(self, query: Tensor, bank: Tensor, k: int, metric: str) -> None:
        self.query, self.bank, self.k = query, bank, k
        self.cosine, self.ip = metric == "cosine", metric == "ip"
        shape, device = (len(query), k), query.device
        self.upper = torch.full(shape, torch.inf, dtype=torch.float64, device=device)
        self.squared = torch.full(shape, torch.inf, dtype=torch.float64, device=device)
        self.indices = torch.full(shape, torch.iinfo(torch.int64).max, dtype=torch.int64, device=device)
        self.waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # query, row, lower bound
        self.count = 0

    def look(self, begin: int, rows: Tensor, center: Tensor) -> bool:
        """Adds the rows of a block that can be among the k nearest; False if the block is not fine."""
        query, rows = self.query - center, rows - center
        q, b = query.square().sum(1, keepdim=True), rows.square().sum(1)
        largest = b.max()
        if not bool(largest <= 4 * LARGEST_SQUARED_NORM):
            return False
        # Of a product and two squared norms of D terms each, of the subtraction of the center, of direct differences.
        error = (2 * rows.shape[1] + 32) * torch.finfo(torch.float64).eps * (q + largest)
        # Without |q|^2, which all rows have in common. Of inner products the negative ones, which have nothing else.
        if self.ip:
            squared, q = -(query @ rows.T), torch.zeros_like(q)
        else:
            squared = torch.addmm(b, query, rows.T, alpha=-2)
        nearest = (
            squared.topk(min(self.k, len(rows)), dim=1, largest=False).values if self.k > 1 else squared.amin(1, True)
        )
        self.upper = torch.cat([self.upper, nearest + (q + error)], 1).sort(1).values[:, : self.k]
        i, j = (squared <= self.upper[:, -1:] - (q - error)).nonzero(as_tuple=True)
        self.waiting.append((i, j + begin, squared[i, j] + (q - error)[i, 0]))
        self.count += len(i)
        if self.count > self.query.shape[0] * self.k + WAITING:
            self._settle()
        return True

    def result(self) -> tuple[Tensor, Tensor]:
        if self.waiting:
            self._settle()
        return self.squared, self.indices

    def _settle(self) -> None:
        """Scores what waits and can still be near."""
        i, j, lower = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        near = lower <= self.upper[i, -1]
        i, j = i[near], j[near]
        step = max(1, VALUES // self.query.shape[1])
        scored = [self._squared(i[s : s + step], j[s : s + step]) for s in range(0, len(i), step)]
        own = torch.arange(len(self.query), dtype=torch.int64, device=i.device).repeat_interleave(self.k)
        i, j = torch.cat([own, i]), torch.cat([self.indices.flatten(), j])
        squared = torch.cat([self.squared.flatten(), *scored])
        # By query, then distance, then index; of each query the first k.
        order = j.argsort(stable=True)
        order = order[squared[order].argsort(stable=True)]
        order = order[i[order].argsort(stable=True)]
        counts = torch.bincount(i, minlength=len(self.query))
        first = (counts.cumsum(0) - counts)[:, None] + torch.arange(self.k, dtype=torch.int64, device=i.device)
        best = order[first]
        self.squared, self.indices = squared[best], j[best]
        # Upper bounds of rows that were scored are their distances.
        self.upper = torch.minimum(self.upper, self.squared)
        self.waiting, self.count = [], 0

    def _squared(self, i: Tensor, j: Tensor) -> Tensor:
        rows = _rows(self.bank[j.to(self.bank.device)], self.query.device, self.cosine)
        if self.ip:
            return -(rows * self.query[i]).sum(1)
        return (rows - self.query[i]).square().sum(1)
