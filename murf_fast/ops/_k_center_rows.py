"""Rows of a shard and how far each is from the centers it has met: what a selection over shards asks of everyone."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import backends

NONE = -1  # number of a row that is not there, and a squared distance below all others


class KCenterRows:
    """Consecutive rows of a bank, of which one shard takes care.

    Distances are those of :func:`k_center_greedy` by the same backend, bit for bit: they depend on the two rows alone.

    Args:
        rows: (N, D), floating point, on the CPU; 0 rows are allowed.
        first: Number of its first row among all.
        nearest: (N,) float64, squared distances to the nearest of the centers met so far; None: none was.

    Memory: a copy of the rows, 1 byte per value and 32 bytes per row.
    """

    def __init__(self, rows: Tensor, first: int = 0, nearest: Tensor | None = None) -> None:
        self.rows, self.first = rows, first
        if nearest is None:
            nearest = torch.full((len(rows),), torch.inf, dtype=torch.float64, device="cpu")
        self._visited = _visited(rows, nearest)

    @property
    def nearest(self) -> Tensor:
        """(N,) float64, as the rows have met all centers so far."""
        return self._visited.nearest

    def meet(self, centers: Tensor) -> None:
        """Takes in centers (n, D), whoever's rows they are; one that was met before changes nothing."""
        self._visited.meet(centers)

    def farthest(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rows that are farthest from all centers, the lowest among equals, and how far the next one is.

        Returns:
            rows (count, D); their numbers (count + 1,) int64, rising but for the last, which is that of the farthest
            row not among them; squared distances (count + 1,) float64. ``NONE`` where there are not so many.
        """
        numbers = torch.full((count + 1,), NONE, dtype=torch.int64, device="cpu")
        squared = torch.full((count + 1,), float(NONE), dtype=torch.float64, device="cpu")
        found, beyond = self._ranked(count)
        rows = torch.zeros(count, self.rows.shape[1], dtype=self.rows.dtype, device="cpu")
        rows[: len(found)] = self.rows[found]
        numbers[: len(found)], squared[: len(found)] = found + self.first, self.nearest[found]
        if beyond is not None:
            numbers[count], squared[count] = beyond + self.first, self.nearest[beyond]
        return rows, numbers, squared

    def _ranked(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Own numbers of the farthest rows, rising, and of the one after them."""
        if len(self.nearest) <= count:
            return torch.arange(len(self.nearest), dtype=torch.int64, device="cpu"), None
        last = self.nearest.topk(count + 1).values[count]
        beyond = (self.nearest > last).nonzero().flatten()
        equal = (self.nearest == last).nonzero().flatten()  # one more than is missing, at least
        missing = count - len(beyond)
        return torch.cat([beyond, equal[:missing]]).sort().values, equal[missing]


class _Plain:
    """As the reference meets centers, where there is no extension."""

    def __init__(self, rows: Tensor, nearest: Tensor) -> None:
        self._rows, self.nearest = rows, nearest.clone()

    def meet(self, centers: Tensor) -> None:
        from murf_fast.reference._meet import meet

        rows = self._rows if self._rows.dtype == torch.float64 else self._rows.float()
        for center in centers.to(rows.dtype):
            meet(rows, center, self.nearest)


def _visited(rows: Tensor, nearest: Tensor):
    """What meets centers, by the backend that :func:`k_center_greedy` would take for these rows."""
    if backends.resolve(None, "cpu", rows.dtype) == "reference":
        return _Plain(rows, nearest)
    from murf_fast.native.k_center_greedy import Visited

    return Visited(rows, nearest)
