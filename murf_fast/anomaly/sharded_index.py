"""A bank whose rows lie on several ranks of ``torch.distributed``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from murf_fast.annotations import Distance
from murf_fast.anomaly._options import IndexOptions
from murf_fast.ops.nearest_distance import NearestIndex, nearest_distance

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
        self.group, self.local = group, NearestIndex(rows, **options)
        if self.local.bank.dtype == torch.float64:
            raise TypeError("murf_fast.ShardedIndex: `rows` must be float32, bfloat16 or float16, got torch.float64")
        counts = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=self.local.device)
        counts[dist.get_rank(group)] = len(self.local)
        dist.all_reduce(counts, group=group)
        self.counts = counts.tolist()
        self.offset = sum(self.counts[: dist.get_rank(group)])
        if sum(self.counts) >= 2**32:
            raise ValueError(f"murf_fast.ShardedIndex: at most 2^32 rows, got {sum(self.counts)}")

    def __len__(self) -> int:
        return sum(self.counts)

    def search(self, query: Tensor, *, k: int = 1, metric: Distance = "l2") -> tuple[Tensor, Tensor]:
        """As :func:`nearest_distance`; ``query`` must be the same on every rank, and not float64.

        Distances are not negative, so their bits order as they do: distance and index travel as one integer, of which
        a minimum is exact and takes the lower index among equals.

        Raises:
            TypeError, ValueError: An argument is wrong, or ``k`` is more than the rows of all ranks.

        Memory: as :func:`nearest_distance`, and 8 bytes per query; for k > 1 a few times the results of every rank.
        """
        if query.dtype == torch.float64:
            raise TypeError("murf_fast.ShardedIndex: `query` must be float32, bfloat16 or float16, got torch.float64")
        if k > len(self):
            raise ValueError(f"murf_fast.ShardedIndex: `k` must be at most the {len(self)} rows of the bank, got {k}")
        distances, indices = nearest_distance(query, self.local, k=min(k, len(self.local)), metric=metric)
        packed = (distances.view(torch.int32).long() << 32) | (indices + self.offset)
        if k == 1:
            dist.all_reduce(packed, op=dist.ReduceOp.MIN, group=self.group)
        else:
            mine = torch.full((len(query), k), torch.iinfo(torch.int64).max, dtype=torch.int64, device=packed.device)
            mine[:, : packed.shape[1]] = packed
            everyone = [torch.empty_like(mine) for _ in self.counts]
            dist.all_gather(everyone, mine, group=self.group)
            packed = torch.cat(everyone, 1).sort(1).values[:, :k]
        return (packed >> 32).int().view(torch.float32), packed & 0xFFFFFFFF
