"""Queries of an axis in tiles of eight with the keys they share: what the GPU's kernels of window attention walk.

A tensor core multiplies blocks of a fixed shape: eight by eight queries are one, and eight by eight keys, of which a
tile walks as many as it needs. So a place that no query fills costs what a query does, unlike in the blocks of the CPU
(:mod:`murf_fast.tables.query_blocks`), and tiles are cut for the fewest steps of eight keys.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from murf_fast.tables._table import Table
from murf_fast.windows import axis_window

SIDE = 8
NONE = -1
# What a tile costs beside its steps (bringing queries in, storing results), in a quarter of a step.
STEP, OVERHEAD = 4, 1


@dataclass(frozen=True, eq=False)
class AxisTiles(Table):
    """Tiles of one axis. ``members`` (tiles, 8): the tile's queries; ``partners`` (tiles, 8 max(steps)): the keys that
    any of them reads, in ascending order; both filled up with -1. ``steps`` (tiles,): groups of eight partners.

    Made the other way round, members are keys, and partners the queries that read them.
    """

    members: np.ndarray
    partners: np.ndarray
    steps: np.ndarray

    def __len__(self) -> int:
        return len(self.members)

    @property
    def most_steps(self) -> int:
        return self.partners.shape[1] // SIDE

    def device_arrays(self) -> tuple[np.ndarray, ...]:
        return self.members, self.partners, self.steps


@functools.lru_cache(256)
def axis_tiles(spec: str, out: int, size: int, of_keys: bool = False) -> AxisTiles:
    """Tiles of the queries of one axis of a window rule, or of its keys."""
    reads = axis_window(spec, out, size).multiplicity() > 0
    if of_keys:
        reads = np.ascontiguousarray(reads.T)
    order = _neighbours_first(reads)
    runs = _cut(reads[order])
    unions = [np.nonzero(reads[order[begin:end]].any(0))[0] for begin, end in runs]
    steps = [-(-len(union) // SIDE) for union in unions]
    members = np.full((len(runs), SIDE), NONE, np.int32)
    partners = np.full((len(runs), SIDE * max(1, *steps)), NONE, np.int32)
    for i, ((begin, end), union) in enumerate(zip(runs, unions, strict=True)):
        members[i, : end - begin] = order[begin:end]
        partners[i, : len(union)] = union
    return AxisTiles(members, partners, np.array(steps, np.int32))


def _neighbours_first(reads: np.ndarray) -> np.ndarray:
    """The rows in an order in which rows that share columns follow each other: those of a dilation's groups apart."""
    group = np.arange(reads.shape[1])  # the first column of those that rows connect with a column

    def root(column: int) -> int:
        while group[column] != column:
            column = group[column]
        return int(column)

    columns = [np.nonzero(row)[0].tolist() for row in reads]
    for row in columns:
        for column in row[1:]:
            group[root(column)] = root(row[0])
    keys = [(root(row[0]), row, i) if row else (NONE, row, i) for i, row in enumerate(columns)]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__))


def _cut(reads: np.ndarray) -> list[tuple[int, int]]:
    """Runs of at most eight rows that cost the least together."""
    rows = len(reads)
    cost, start = np.zeros(rows + 1, np.int64), np.zeros(rows + 1, np.int64)
    for end in range(1, rows + 1):
        begins = np.arange(end - 1, max(end - SIDE, 0) - 1, -1)
        unions = np.logical_or.accumulate(reads[begins], 0).sum(1)
        costs = cost[begins] + STEP * -(-unions // SIDE) + OVERHEAD
        best = len(costs) - 1 - int(np.argmin(costs[::-1]))  # the longest of the cheapest
        cost[end], start[end] = costs[best], begins[best]
    runs, end = [], rows
    while end:
        runs.append((int(start[end]), end))
        end = int(start[end])
    return runs[::-1]
