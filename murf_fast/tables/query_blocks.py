"""Queries that share keys, grouped: what the CPU's kernels of window attention walk."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from murf_fast.tables._table import Table, kept
from murf_fast.windows import AxisWindow, axis_window

# Queries of one block of the backward kernels along an axis: eight by eight fill the registers of a matrix kernel.
MEMBERS = 8

# A block of fewer queries along an axis does not fill a vector.
FEW = 4

# Blocks of the forward kernels are the cheapest of these. A vector of queries times a key is the unit; bringing a key
# in costs about half of it with 64 channels a head, where that was profiled, and a block a few.
SIDES, MOST_QUERIES = (4, 8, 16), 256
LANES, BRINGING_IN, PER_BLOCK = 16, 0.5, 8.0
# Keys whose values are summed in registers (csrc/level/window_attention.cpp), and scores that a thread keeps
# (csrc/level/window_weights.h): sums of more keys go through memory, and the products of more scores are made twice.
SUMMED_KEYS, THROUGH_MEMORY = 192, 1.3
KEPT_SCORES, MADE_TWICE = 1 << 16, 1.3


@dataclass(frozen=True, eq=False)
class AxisBlocks(Table):
    """Blocks of one axis: ``members[member_begin[i] : member_begin[i + 1]]`` are queries, likewise the union of their
    keys. ``masks`` hold, for blocks whose queries differ, log(how often a query counts a key) by key, then query.
    """

    out_size: int
    in_size: int
    member_begin: np.ndarray
    members: np.ndarray
    key_begin: np.ndarray
    keys: np.ndarray
    mask_begin: np.ndarray
    masks: np.ndarray
    exact: np.ndarray

    def __len__(self) -> int:
        return len(self.exact)

    def spans(self) -> list[tuple[tuple[int, int], ...]]:
        """For every block, the run of its keys that each of its queries reads."""
        spans = []
        for i in range(len(self)):
            members, keys = (int(b[i + 1] - b[i]) for b in (self.member_begin, self.key_begin))
            if self.exact[i]:
                spans.append(((0, keys),) * members)
                continue
            reads = np.isfinite(self.masks[self.mask_begin[i] :][: keys * members].reshape(keys, members))
            first, end = reads.argmax(0), keys - reads[::-1].argmax(0)
            spans.append(tuple(zip(first.tolist(), end.tolist(), strict=True)))
        return spans


@functools.lru_cache(256)
def axis_blocks(spec: str, out: int, size: int, members: int, joined: int = FEW) -> AxisBlocks:
    """Blocks of at most ``members`` queries for one axis of a window rule; up to ``joined`` of them that share keys are
    joined whatever it costs.
    """
    window = axis_window(spec, out, size)
    blocks = [part for block in _merged(window, members, joined) for part in _split(block, members)]
    blocks.sort(key=lambda block: block[0])
    member_begin, key_begin, mask_begin, exact = [0], [0], [], []
    all_members: list[Any] = []
    all_keys: list[Any] = []
    masks: list[Any] = []
    for block in blocks:
        counts = _counts(window, block)
        keys = np.nonzero(counts.any(0))[0]
        counts = counts[:, keys]
        exact.append(bool((counts == 1).all()))
        mask_begin.append(sum(m.size for m in masks))
        if not exact[-1]:
            with np.errstate(divide="ignore"):
                masks.append(np.log(counts.T.astype(np.float32)))
        all_members += block
        all_keys.append(keys)
        member_begin.append(len(all_members))
        key_begin.append(key_begin[-1] + len(keys))
    return AxisBlocks(
        out,
        size,
        np.array(member_begin, np.int32),
        np.array(all_members, np.int32),
        np.array(key_begin, np.int32),
        np.concatenate(all_keys).astype(np.int32),
        np.array(mask_begin, np.int64),
        np.concatenate([m.ravel() for m in masks]) if masks else np.zeros(0, np.float32),
        np.array(exact, np.uint8),
    )


def blocks_of(rows: str, columns: str, out: tuple[int, int], grid: tuple[int, int]) -> tuple[AxisBlocks, AxisBlocks]:
    """Blocks of both axes for the backward kernels."""
    return axis_blocks(rows, out[0], grid[0], MEMBERS), axis_blocks(columns, out[1], grid[1], MEMBERS)


@functools.lru_cache(256)
def forward_blocks_of(
    rows: str, columns: str, out: tuple[int, int], grid: tuple[int, int]
) -> tuple[AxisBlocks, AxisBlocks]:
    """Blocks of both axes for the forward kernels, where a vector of queries meets the keys of its rows only."""

    def cost(blocks: tuple[AxisBlocks, AxisBlocks]) -> float:
        y_blocks, x_blocks = blocks
        shapes = Counter(
            zip(np.diff(x_blocks.member_begin).tolist(), np.diff(x_blocks.key_begin).tolist(), strict=True)
        )
        bands = Counter(y_blocks.spans())
        return sum(
            many * times * _block_cost(spans, queries, keys)
            for spans, many in bands.items()
            for (queries, keys), times in shapes.items()
        )

    # Rows of queries may differ in what they read, as every vector meets the keys of its own rows.
    choices = (
        (axis_blocks(rows, out[0], grid[0], y, joined), axis_blocks(columns, out[1], grid[1], x))
        for y in SIDES
        for joined in sorted({FEW, y})
        for x in SIDES
        if y * x <= MOST_QUERIES
    )
    return min(choices, key=cost)


def _block_cost(spans: tuple[tuple[int, int], ...], queries: int, keys: int) -> float:
    """Of a block with ``spans`` of rows of keys, one for each row of ``queries``; ``keys`` in a row."""
    rows = max(end for _, end in spans)
    width = -(-len(spans) * queries // LANES) * LANES
    products = 0.0
    for first in range(0, len(spans) * queries, LANES):
        own = spans[first // queries : (min(first + LANES, len(spans) * queries) - 1) // queries + 1]
        products += max(end for _, end in own) - min(begin for begin, _ in own)
    if len(set(spans)) > 1:  # rows of queries meet the values one by one, in pairs
        products = (products + sum(end - begin for begin, end in spans) * (queries + queries % 2) / LANES) / 2
    if rows * keys > SUMMED_KEYS:
        products *= THROUGH_MEMORY
    if rows * keys * width > KEPT_SCORES:
        products *= MADE_TWICE
    return (products + BRINGING_IN * rows) * keys + PER_BLOCK


def log_multiplicity(spec: str, out: int, size: int, device: torch.device) -> Tensor:
    """(out, size) float32: log of how often a query counts a key, -inf outside its window."""
    (logs,) = kept(device, ("log_multiplicity", spec, out, size), (_log_multiplicity(spec, out, size, device),))
    return logs


@functools.lru_cache(256)
def _log_multiplicity(spec: str, out: int, size: int, device: torch.device) -> Tensor:
    with np.errstate(divide="ignore"):
        return torch.from_numpy(np.log(axis_window(spec, out, size).multiplicity())).to(device)


def _merged(window: AxisWindow, limit: int, joined: int) -> Iterator[list[int]]:
    """Queries with equal windows; neighbouring groups are joined while that costs less than keeping them apart.

    Work of a block along an axis: keys times (queries + 1), the one for bringing the keys in. Up to ``joined`` queries
    are joined whenever they share keys.
    """
    groups: dict[bytes, list[int]] = {}
    for i in range(window.out_size):
        groups.setdefault(window.index[i, : window.count[i]].tobytes(), []).append(i)
    ordered = sorted(groups.values(), key=lambda g: (*window.index[g[0], : window.count[g[0]]].tolist(), g[0]))
    current: list[int] = []
    current_keys: set[int] = set()
    for group in ordered:
        keys = set(window.index[group[0], : window.count[group[0]]].tolist())
        if current:
            together, queries = len(keys | current_keys), len(group) + len(current)
            apart = len(keys) * (len(group) + 1) + len(current_keys) * (len(current) + 1)
            few = queries <= joined and together < len(keys) + len(current_keys)
            if queries <= limit and (few or together * (queries + 1) <= apart):
                current, current_keys = current + group, current_keys | keys
                continue
            yield sorted(current)
        current, current_keys = group, keys
    yield sorted(current)


def _split(block: list[int], limit: int) -> Iterator[list[int]]:
    parts = -(-len(block) // limit)
    for i in range(parts):
        yield block[len(block) * i // parts : len(block) * (i + 1) // parts]


def _counts(window: AxisWindow, block: list[int]) -> np.ndarray:
    counts = np.zeros((len(block), window.size), np.int32)
    for row, i in enumerate(block):
        np.add.at(counts[row], window.index[i, : window.count[i]], 1)
    return counts
