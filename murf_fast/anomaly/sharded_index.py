"""A bank whose rows lie on several shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from murf_fast.annotations import Distance
from murf_fast.anomaly._index_options import IndexOptions
from murf_fast.anomaly.shards.rows import rows_of
from murf_fast.anomaly.shards.search import LARGEST, SearchShard, search
from murf_fast.anomaly.shards.transport import Ranks, Shards
from murf_fast.ops.nearest_distance import NearestIndex

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ShardedIndex:
    """This rank's rows of a bank; a search looks at every rank's and gives the same answer on all of them.

    Args:
        rows: (m, D), this rank's rows; at least one. Ranks may hold different numbers of rows.
        group: Process group (gloo, nccl); None is the default one.
        options: As for :class:`NearestIndex`, but for ``ip``: ranks are merged by the least distance.

    Rows are numbered by rank: rank 0's come first. Making one and searching are collective: all ranks of the group call
    them.

    Raises:
        TypeError, ValueError: An argument is wrong, rows are float64, or all ranks' are 2^32 and more; the message says
            which.

    Memory: as :class:`NearestIndex` for this rank's rows.
    """

    def __init__(
        self, rows: Tensor, *, group: dist.ProcessGroup | None = None, **options: Unpack[IndexOptions]
    ) -> None:
        if options.get("ip"):
            raise ValueError("murf_fast.ShardedIndex: `ip` must be False: ranks are merged by the least distance")
        self.local = own = NearestIndex(rows, **options)
        if own.bank.dtype == torch.float64:
            raise TypeError("murf_fast.ShardedIndex: `rows` must be float32, bfloat16 or float16, got torch.float64")
        ranks = Ranks(len(own), group, own.device)
        ranks.shard = SearchShard(own, ranks.offset)
        self._over(ranks)

    @classmethod
    def _of(cls, shards: Shards) -> ShardedIndex:
        """One whose shards, each a ``SearchShard``, another transport asks."""
        index = cls.__new__(cls)
        index._over(shards)
        return index

    def _over(self, shards: Shards) -> None:
        if sum(shards.counts) >= LARGEST:
            raise ValueError(f"murf_fast.ShardedIndex: at most 2^32 rows, got {sum(shards.counts)}")
        self._shards, self.counts = shards, shards.counts

    def __len__(self) -> int:
        return sum(self.counts)

    def search(self, query: Tensor, *, k: int = 1, metric: Distance | None = "l2") -> tuple[Tensor, Tensor]:
        """As :func:`nearest_distance`; ``query`` must be the same on every rank, and not float64. ``metric`` None: that
        which the rows were prepared for.

        Distances are those of one bank, bit for bit. Of rows at distances that are equal in float32 the lowest index
        comes first, where one bank still tells them apart in float64.

        Raises:
            TypeError, ValueError: An argument is wrong, or ``k`` is more than the rows of all ranks.

        Memory: as :func:`nearest_distance`, and 8 bytes per query; for k > 1 a few times the results of every rank.
        """
        if query.dtype == torch.float64:
            raise TypeError("murf_fast.ShardedIndex: `query` must be float32, bfloat16 or float16, got torch.float64")
        if k > len(self):
            raise ValueError(f"murf_fast.ShardedIndex: `k` must be at most the {len(self)} rows of the bank, got {k}")
        return search(self._shards, query, k, metric)

    def rows(self, numbers: Tensor) -> Tensor:
        """(n, D): rows of the bank by their numbers (n,) int64; the same on every rank."""
        return rows_of(self._shards, numbers)
