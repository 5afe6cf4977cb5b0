"""A search of some queries in a bank's cells: those of their nearest centres first, then those that matter."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast.kernels.nearest_candidates import Bounds, Candidates, Rounded, candidates, rounded
from murf_fast.kernels.nearest_cells import Blocks, Launcher
from murf_fast.kernels.nearest_exact import Bank, Listed, Proof, choose, score
from murf_fast.kernels.nearest_lists import candidates_of, merged, nearest_listed
from murf_fast.tables.nearest_cells import Cells, Rows, first_cells, lower_bounds, squared_distances

# Entries of queries and cells, or columns, that bounds are computed of at a time: 8 MB in float64, six times.
ENTRIES = 1 << 20


class Search:
    """Some queries, sorted by their nearest centre."""

    def __init__(self, query: Tensor, bank: Tensor, index: list[Tensor], cells: Cells, k: int, metric: str) -> None:
        self.mean, scale, self.low, self.norms, limits = index
        self.cells, self.k, self.metric, self.dim = cells, k, metric, bank.shape[1]
        made = rounded(query, self.mean, metric == "cosine", self.low.dtype)
        squared, norms = self._to_centres(query, made.scales)
        self.order = squared.argmin(1).argsort(stable=True)
        self.query, self.squared, self.query_norms = (x.index_select(0, self.order) for x in (query, squared, norms))
        self.made = Rounded(*(x.index_select(0, self.order) if len(x) else x for x in made))
        self.bank = Bank(bank, bank.stride(0), scale if scale.numel() else None)
        self.bounds = Bounds(self.made.errors, self.made.squares, limits)
        self.wanted = candidates_of(k, len(bank))
        self.launcher = Launcher(self.low, len(query))

    def run(self, distances: Tensor, indices: Tensor, last: Tensor, status: Tensor) -> Tensor:
        """Writes what ``nearest_distance`` does of a first pass; returns the pairs that were looked at, float64 ()."""
        near = self.launcher.active(first_cells(self.squared, self.cells, self.k), self.cells)
        found = self._look(self.launcher.listed(near))
        listed = Listed(found.places, found.counts, found.places)
        squared, _ = nearest_listed(self.query, self.made.scales, self.bank, listed, self.k)
        matter = self.launcher.active(self._matter(squared[:, -1].sqrt() * (1 + 2.0**-20)), self.cells) & ~near
        found = merged(found, self._look(self.launcher.listed(matter)))
        listed = Listed(found.places, found.counts, found.places)
        exact = score(self.query, self.made.scales, self.bank, listed)
        own = [x.new_empty(x.shape) for x in (distances, indices, last, status)]
        proof = Proof(found.dropped, self.made.norms, *own[2:])
        choose(exact, listed, self.metric, *own[:2], self.dim, proof, self.bounds)
        for x, sorted_x in zip((distances, indices, last, status), own, strict=True):
            x[self.order] = sorted_x
        return self.launcher.looked_at(near) + self.launcher.looked_at(matter)

    def _look(self, blocks: Blocks) -> Candidates:
        """The candidates among listed rows, named as the bank has them."""
        searched = self.launcher.search(self.made.rows, self.made.squares.float(), self.low, self.norms, blocks)
        found = candidates(searched, self.bounds, 0, self.dim, self.k, self.wanted)
        return found._replace(places=self.launcher.named(found.places, found.counts, blocks, self.cells))

    def _to_centres(self, query: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, N) squared distances and (Q,) norms, of centred rows in float64."""
        squared = torch.empty(len(query), len(self.cells.centres), dtype=torch.float64, device=query.device)
        norms = torch.empty(len(query), dtype=torch.float64, device=query.device)
        centred = Rows(query, self.mean, scales)
        for part in self._parts(len(query)):
            rows = centred[part]
            squared[part], norms[part] = squared_distances(rows, self.cells), rows.square().sum(1).sqrt()
        return squared, norms

    def _matter(self, upper: Tensor) -> Tensor:
        """(Q, N) bool: cells with rows that may be as near as ``upper`` (Q,), which the k-th row is not beyond."""
        near = torch.empty(self.squared.shape, dtype=torch.bool, device=upper.device)
        for part in self._parts(len(upper)):
            lower = lower_bounds(self.squared[part], self.query_norms[part], self.cells)
            near[part] = lower <= upper[part, None]
        return near

    def _parts(self, queries: int) -> list[slice]:
        step = max(1, ENTRIES // max(self.cells.centres.shape))
        return [slice(begin, begin + step) for begin in range(0, queries, step)]
