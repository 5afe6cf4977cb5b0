"""Banks of a folder, searched by workers of Ray, each of which holds a shard of their rows."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from murf_fast.anomaly.sharded_index import ShardedIndex
from murf_fast.anomaly.shards._ray import Pool, RayShards
from murf_fast.anomaly.shards.rows import Range, bounds
from murf_fast.anomaly.shards.search import SearchShard
from murf_fast.ops.nearest_distance import NearestIndex


def search_shards(pool: Pool, name: str, rows: Range, device: str, options: dict[str, Any]) -> ShardedIndex:
    """The rows, one shard a worker, or fewer where there are fewer rows.

    Args:
        pool: The workers.
        name: Of the shards in them.
        rows: Of a file that all workers see.
        device: Where they search.
        options: As for :class:`NearestIndex`.
    """
    cuts = [rows.begin + n for n in bounds(rows.end - rows.begin, len(pool))]
    parts = [dataclasses.replace(rows, begin=begin, end=end) for begin, end in itertools.pairwise(cuts)]
    options = {**options, "device": device}
    counts = [part.end - part.begin for part in parts]
    return ShardedIndex._of(
        RayShards(pool, name, counts, lambda shard: (_search_shard, (parts[shard], rows.begin, options)))
    )


def _search_shard(rows: Range, zero: int, options: dict[str, Any]) -> SearchShard:
    bank = rows.mapped().to(options["device"])  # a mapped bank stays mapped on a CPU
    return SearchShard(NearestIndex(bank, **options), rows.begin - zero)
