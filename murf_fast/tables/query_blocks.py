"""Queries that share keys, grouped: what the CPU's kernels of window attention walk."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from murf_fast.tables._table import Table, kept
from murf_fast.windows import AxisWindow, axis_window

# Queries of one block along an axis. Eight by eight queries fill the registers of a matrix kernel, and the scores of a
# window of 1024 keys stay within 256 KB; beyond that many keys, four by four.
MEMBERS, MEMBERS_OF_MANY_KEYS, MANY_KEYS = 8, 4, 1024


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


@functools.lru_cache(256)
def axis_blocks(spec: str, out: int, size: int, members: int) -> AxisBlocks:
    """Blocks of at most ``members`` queries for one axis of a window rule."""
    window = axis_window(spec, out, size)
    blocks = [part for block in _merged(window, members) for part in _split(block, members)]
    blocks.sort(key=lambda block: block[0])
    member_begin, key_begin, mask_begin, exact = [0], [0], [], []
    all_members, all_keys, masks = [], [], []
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
    """Blocks of both axes, small where a window has many keys."""
    keys = axis_window(rows, out[0], grid[0]).taps * axis_window(columns, out[1], grid[1]).taps
    members = MEMBERS if keys <= MANY_KEYS else MEMBERS_OF_MANY_KEYS
    return axis_blocks(rows, out[0], grid[0], members), axis_blocks(columns, out[1], grid[1], members)


def log_multiplicity(spec: str, out: int, size: int, device: torch.device) -> Tensor:
    """(out, size) float32: log of how often a query counts a key, -inf outside its window."""
    (logs,) = kept(device, ("log_multiplicity", spec, out, size), (_log_multiplicity(spec, out, size, device),))
    return logs


@functools.lru_cache(256)
def _log_multiplicity(spec: str, out: int, size: int, device: torch.device) -> Tensor:
    with np.errstate(divide="ignore"):
        return torch.from_numpy(np.log(axis_window(spec, out, size).multiplicity())).to(device)


def _merged(window: AxisWindow, limit: int) -> Iterator[list[int]]:
    """Queries with equal windows; neighbouring groups are joined while that costs less than keeping them apart.

    Work of a block along an axis: keys times (queries + 1), the one for bringing the keys in. Up to four queries are
    joined whenever they share keys, because a block of fewer does not fill a vector.
    """
    groups: dict[bytes, list[int]] = {}
    for i in range(window.out_size):
        groups.setdefault(window.index[i, : window.count[i]].tobytes(), []).append(i)
    ordered = sorted(groups.values(), key=lambda g: (*window.index[g[0], : window.count[g[0]]].tolist(), g[0]))
    current, current_keys = [], set()
    for group in ordered:
        keys = set(window.index[group[0], : window.count[group[0]]].tolist())
        if current:
            together, queries = len(keys | current_keys), len(group) + len(current)
            apart = len(keys) * (len(group) + 1) + len(current_keys) * (len(current) + 1)
            few = queries <= 4 and together < len(keys) + len(current_keys)
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
