"""Banks prepared for searches, in this process or over shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from murf_fast.anomaly._patches import WHAT
from murf_fast.anomaly.scoring import ScoringRules
from murf_fast.anomaly.sharded_index import ShardedIndex
from murf_fast.anomaly.shards.rows import bounds
from murf_fast.ops._ivf import IVFIndex
from murf_fast.ops.nearest_distance import NearestIndex, nearest_distance

Index = NearestIndex | IVFIndex | ShardedIndex
# Of a bank's number, its rows and the options of `NearestIndex`: what searches it over shards.
Sharded = Callable[[int, Tensor, dict[str, Any]], ShardedIndex]


def prepared(
    number: int,
    bank: Tensor,
    kind: str,
    rules: ScoringRules,
    precision: str,
    device: torch.device,
    sharded: Sharded | None,
) -> Index:
    """The bank of this number, as ``index``, ``rules`` and ``precision`` of a detector say; ``sharded``: over shards,
    of exact ones."""
    cosine = rules.metric == "cosine"
    if kind == "ivf":
        return IVFIndex(bank, nlist=min(512, len(bank)), nprobe=min(32, len(bank)), cosine=cosine)
    options: dict[str, Any] = {"cosine": cosine, "precision": precision}
    if kind == "cells":
        options["cells"] = "auto"
    if sharded is not None:
        return sharded(number, bank, options)
    return NearestIndex(bank, device=device, **options)


def over_ranks(group: dist.ProcessGroup, device: torch.device) -> Sharded:
    """Every rank of ``torch.distributed`` holds a part of each bank."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)

    def sharded(_: int, bank: Tensor, options: dict[str, Any]) -> ShardedIndex:
        cuts = bounds(len(bank), ranks)
        if len(cuts) <= ranks:
            raise ValueError(f"murf_fast.{WHAT}: a bank of {len(bank)} rows has none for each of {ranks} ranks")
        return ShardedIndex(bank[cuts[rank] : cuts[rank + 1]], group=group, device=device, **options)

    return sharded


def search(index: Index, rows: Tensor, rules: ScoringRules) -> tuple[Tensor, Tensor]:
    """Distances and numbers (Q, k) of the nearest rows of a bank, as the rules compare."""
    if isinstance(index, ShardedIndex):
        return index.search(rows, k=rules.k, metric=rules.metric)
    return nearest_distance(rows, index, k=rules.k, metric=rules.metric)
