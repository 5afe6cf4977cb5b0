"""The nearest rows of a bank over shards: every shard searches its own, and (distance, index) merge exactly.

Distances are not negative, so their bits order as they do: distance and index are one integer, of which a minimum is
exact and takes the lower index among equals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast.annotations import Metric
from murf_fast.anomaly.shards.rows import own_rows
from murf_fast.anomaly.shards.transport import Shards
from murf_fast.ops.nearest_distance import NearestIndex, nearest_distance

LARGEST = 1 << 32  # rows of all shards, as an index has 32 bits of the integer
FARTHER = torch.iinfo(torch.int64).max  # than any row


class SearchShard:
    """Rows of a bank from ``first`` on, prepared for searches.

    Args:
        index: The rows.
        first: Number of the first among all.
    """

    def __init__(self, index: NearestIndex, first: int) -> None:
        self._index, self._first = index, first

    def nearest(self, query: Tensor, k: int, metric: Metric | None) -> tuple[Tensor]:
        """(Q, k) int64, rising: distance and index of the nearest rows, ``FARTHER`` where there are fewer."""
        asked_on, query = query.device, query.to(self._index.device)
        distances, numbers = nearest_distance(query, self._index, k=min(k, len(self._index)), metric=metric)
        packed = torch.full((len(query), k), FARTHER, dtype=torch.int64, device=query.device)
        packed[:, : distances.shape[1]] = (distances.view(torch.int32).long() << 32) | (numbers + self._first)
        return (packed.to(asked_on),)

    def rows(self, numbers: Tensor) -> tuple[Tensor]:
        """(n, D): the rows of these numbers, zeros where they are others'."""
        return (own_rows(self._index.bank, self._first, numbers).to(self._index.device),)


def search(shards: Shards, query: Tensor, k: int, metric: Metric | None) -> tuple[Tensor, Tensor]:
    """Distances (Q, k) float32, rising, and indices (Q, k): those of one bank with all rows."""
    if k == 1:
        packed = shards.least("nearest", query, 1, metric)
    else:
        packed = torch.cat([answer for (answer,) in shards.ask("nearest", query, k, metric)], 1).sort(1).values[:, :k]
    packed = packed.to(query.device)
    return (packed >> 32).int().view(torch.float32), packed & 0xFFFFFFFF
