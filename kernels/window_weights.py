"""Scores of a tile of queries and some of its keys, and what all launches of window attention share.

A tile is eight by eight queries of :mod:`murf_fast.tables.window_tiles`, listed in any order, that read nearly the same
keys. Its keys are the rows that any of its rows reads times the columns that any of its columns reads, taken eight by
eight. Whether a query reads a key, and how often it counts it, are two logarithms that its score gets, one of the rows
and one of the columns; -inf outside the window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.kernels.launch import Map, bound, map_of
from murf_fast.tables import window_tiles
from murf_fast.tables.query_blocks import log_multiplicity
from murf_fast.tables.window_tiles import AxisTiles, axis_tiles

SIDE = tl.constexpr(window_tiles.SIDE)
CELLS = tl.constexpr(window_tiles.SIDE**2)
LOG2_E = tl.constexpr(math.log2(math.e))


class Tiles(NamedTuple):
    """The tables of both axes; ``pitch``: partners of a tile in the table."""

    members_y: Tensor
    partners_y: Tensor
    steps_y: Tensor
    pitch_y: int
    members_x: Tensor
    partners_x: Tensor
    steps_x: Tensor
    pitch_x: int


class Cells(NamedTuple):
    """Eight rows times eight columns of a grid, -1 for none; by cell: row, column, whether it exists."""

    rows: Tensor
    columns: Tensor
    y: Tensor
    x: Tensor
    inside: Tensor


class Terms(NamedTuple):
    """What is added to scores, by query row and key row (H, h) and by columns (W, w); biases have a table per head."""

    rows: Tensor
    columns: Tensor
    bias_rows: Tensor | None
    bias_columns: Tensor | None
    height: int
    width: int
    key_height: int
    key_width: int


class Heads(NamedTuple):
    """How channels divide. ``dim``: those of q and k of a head; ``width``: of v that a head weighs; ``scale``: of the
    scores.
    """

    count: int
    dim: int
    width: int
    scale: float


class Attention(NamedTuple):
    """The arguments of every launch."""

    q: Map
    k: Map
    v: Map
    terms: Terms
    heads: Heads


@dataclass(frozen=True)
class AttentionTile:
    """How many channels of q and k, and of v, a program holds at a time; warps, and stages of the pipeline of loads;
    whether products of float32 are made in parts.
    """

    head_dim: int
    channels: int
    warps: int
    stages: int
    in_parts: bool


def attention_tile(
    head_dim: int, width: int, mean: bool, one_step: bool, dtype: torch.dtype, architecture: int
) -> AttentionTile:
    """Four warps are the warp group that multiplies 64 rows on sm_90: eight divide the columns of the scores, and have
    to exchange them before they meet the values. Half precision gets a second stage of loads where each loop has one
    product; elsewhere it spilled when compiled for sm_80. A product of float32 in three parts wants twice the
    registers: with more channels these kernels spilled, 64 of v on sm_80, 64 beside weights that are formed again on
    sm_90, 32 of q and k on sm_100. Weights that are formed again take eight warps, as four spilled, and so do more than
    64 channels of a head's own, but for float32 on sm_90, where eight spilled with any number of channels that is worth
    it. As every program of theirs makes the scores again, they take what a generation's registers hold.
    """
    again, hopper = mean and not one_step, 90 <= architecture < 100
    old = launch.without_warp_groups(architecture)
    wide = not mean and width > 64
    warps = 8 if again or wide else 4
    if dtype != torch.float32:
        stages = (3 if hopper else 2) if mean and one_step else 1
        return AttentionTile(block_of(head_dim, 64), block_of(width, 64), warps, stages, True)
    if wide and not old and architecture < 100:
        return AttentionTile(block_of(head_dim, 32), 32, 4, 1, True)
    channels = (32 if old else 128) if wide else 16 if old else 32 if again else 64
    return AttentionTile(
        block_of(head_dim, 32 if hopper else 16), block_of(width, channels), warps, 1, not (again and old)
    )


def block_of(channels: int, most: int) -> int:
    """16 is the least that a matrix product takes."""
    return min(max(launch.power_of_two(channels), 16), most)


class Call:
    """What the launches of one call share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias_y: Tensor | None,
        bias_x: Tensor | None,
        rule: tuple[str, str],
        heads: int,
        mean: bool,
        scale: float,
    ):
        self.rule, self.device, self.batch = rule, q.device, q.shape[0]
        self.out, self.grid = tuple(q.shape[2:]), tuple(k.shape[2:])
        rows, columns = self.axes()
        self.tiles, self.counts = tiles_of(rows, columns, q.device), (len(rows), len(columns))
        self.one_step = rows.most_steps == columns.most_steps == 1
        logs = [log_multiplicity(spec, o, n, q.device) for spec, o, n in zip(rule, self.out, self.grid, strict=True)]
        terms = Terms(*logs, bias_y, bias_x, *self.out, *self.grid)
        head_dim, width = q.shape[1] // heads, v.shape[1] if mean else v.shape[1] // heads
        sizes = Heads(heads, head_dim, width, scale)
        self.attention = Attention(map_of(q), map_of(k), map_of(v), terms, sizes)
        architecture = launch.architecture(q.device)
        self.tile = attention_tile(head_dim, width, mean, self.one_step, q.dtype, architecture)
        self.programs = self.batch * len(rows) * len(columns)
        self.c_tiles = launch.cdiv(width, self.tile.channels)

    def axes(self, of_keys: bool = False) -> tuple[AxisTiles, AxisTiles]:
        """Tiles of rows and columns of the queries, or of the keys."""
        axes = zip(self.rule, self.out, self.grid, strict=True)
        rows, columns = (axis_tiles(spec, out, size, of_keys) for spec, out, size in axes)
        return rows, columns

    def options(self) -> dict:
        """Options of a launch."""
        return {
            "WHOLE_D": self.attention.heads.dim <= self.tile.head_dim,
            "BLOCK_D": self.tile.head_dim,
            "BLOCK_C": self.tile.channels,
            "PRECISION": launch.dot_precision(self.tile.in_parts),
            "num_warps": self.tile.warps,
            "num_stages": self.tile.stages,
            "maxnreg": 255,
        }


def tiles_of(rows: AxisTiles, columns: AxisTiles, device: torch.device) -> Tiles:
    return Tiles(*rows.on(device), rows.partners.shape[1], *columns.on(device), columns.partners.shape[1])


@triton.jit
def tile_of(program, y_tiles, x_tiles):
    """(image, row of tiles, column of tiles)"""
    return program // x_tiles // y_tiles, program // x_tiles % y_tiles, program % x_tiles


@triton.jit
def _cells(rows, columns):
    """The cells of eight rows and eight columns, those of a row after each other; both given by where they are."""
    side, at = tl.arange(0, SIDE), tl.arange(0, CELLS)
    y, x = tl.load(rows + at // SIDE), tl.load(columns + at % SIDE)
    return Cells(tl.load(rows + side), tl.load(columns + side), y, x, (y >= 0) & (x >= 0))


@triton.jit
def members_of(tiles, i, j):
    """The cells that tile (i, j) is made of."""
    return _cells(tiles.members_y + i * SIDE, tiles.members_x + j * SIDE)


@triton.jit
def partners_of(tiles, i, j, step):
    """The cells of step ``step`` that the members of tile (i, j) go with."""
    columns = tl.load(tiles.steps_x + j)
    y = tiles.partners_y + i * tiles.pitch_y + step // columns * SIDE
    return _cells(y, tiles.partners_x + j * tiles.pitch_x + step % columns * SIDE)


@triton.jit
def steps_of(tiles, i, j):
    return tl.load(tiles.steps_y + i) * tl.load(tiles.steps_x + j)


@triton.jit
def _pointers(map, b, cells, c):
    """Of channels c of the cells, (cells, channels)."""
    pixels = map.data + tl.cast(b, tl.int64) * map.stride_b
    pixels = pixels + cells.y.to(tl.int64) * map.stride_y + cells.x.to(tl.int64) * map.stride_x
    return pixels[:, None] + (c.to(tl.int64) * map.stride_c)[None, :]


@triton.jit
def load_cells(map, b, cells, first, end, BLOCK: tl.constexpr):
    """Channels first .. first + BLOCK of the cells, 0 from ``end`` on: (cells, BLOCK)."""
    c = first + tl.arange(0, BLOCK)
    return tl.load(_pointers(map, b, cells, c), mask=cells.inside[:, None] & (c < end)[None, :], other=0.0)


@triton.jit
def store_cells(map, b, cells, first, end, values, BLOCK: tl.constexpr):
    c = first + tl.arange(0, BLOCK)
    mask = cells.inside[:, None] & (c < end)[None, :]
    tl.store(_pointers(map, b, cells, c), values.to(map.data.dtype.element_ty), mask=mask)


@triton.jit
def products_of(left, right, b, left_cells, right_cells, first, end, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """Products of the cells of two maps over channels [first, end), (left, right) float32; BLOCK at a time, or all."""
    total = tl.zeros((CELLS, CELLS), dtype=tl.float32)
    if WHOLE:
        a = load_cells(left, b, left_cells, first, end, BLOCK)
        other = load_cells(right, b, right_cells, first, end, BLOCK)
        return tl.dot(a, tl.trans(other), input_precision=PRECISION)
    for c in range(0, bound(end - first), BLOCK):
        a = load_cells(left, b, left_cells, first + c, end, BLOCK)
        other = load_cells(right, b, right_cells, first + c, end, BLOCK)
        total = tl.dot(a, tl.trans(other), total, input_precision=PRECISION)
    return total


@triton.jit
def _entries(table, own_stride, partner_stride, own, partners):
    """Entries of a table for each of ``own`` and each of eight ``partners``; 0 where one of them is -1."""
    at = own[:, None] * own_stride + partners[None, :] * partner_stride
    return tl.load(table + at, mask=(own >= 0)[:, None] & (partners >= 0)[None, :], other=0.0)


@triton.jit
def terms_of(attention, head, mine, partners, OF_KEYS: tl.constexpr):
    """What a head's scores get, (mine, partners): -inf where a query does not read a key. ``OF_KEYS``: mine are keys,
    and the tables are transposed.
    """
    terms = attention.terms
    if OF_KEYS:
        own_y, own_x, partner_y, partner_x = 1, 1, terms.key_height, terms.key_width
    else:
        own_y, own_x, partner_y, partner_x = terms.key_height, terms.key_width, 1, 1
    rows = _entries(terms.rows, own_y, partner_y, mine.y, partners.rows)
    columns = _entries(terms.columns, own_x, partner_x, mine.x, partners.columns)
    if terms.bias_rows is not None:
        of_rows = terms.bias_rows + tl.cast(head, tl.int64) * terms.height * terms.key_height
        of_columns = terms.bias_columns + tl.cast(head, tl.int64) * terms.width * terms.key_width
        rows += _entries(of_rows, own_y, partner_y, mine.y, partners.rows)
        columns += _entries(of_columns, own_x, partner_x, mine.x, partners.columns)
    term = tl.reshape(rows[:, :, None] + columns[:, None, :], (CELLS, CELLS))
    return tl.where(partners.inside[None, :], term, float("-inf"))


@triton.jit
def scores_of(attention, b, head, mine, partners, term, OF_KEYS: tl.constexpr, WHOLE_D: tl.constexpr,
              BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores of one head, (mine, partners); ``term``: those of all heads, None if they differ."""
    own, other = attention.q, attention.k
    if OF_KEYS:
        own, other = attention.k, attention.q
    first = head * attention.heads.dim
    products = products_of(own, other, b, mine, partners, first, first + attention.heads.dim, WHOLE_D, BLOCK_D,
                           PRECISION)  # fmt: skip
    if term is None:
        term = terms_of(attention, head, mine, partners, OF_KEYS)
    return products * attention.heads.scale + term


@triton.jit
def shift_of(largest):
    """What is subtracted from scores: a largest one of -inf, of nothing but keys that are not read, would give NaN."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def exponential_of(x):
    """A power of e as one of two, which is one instruction; Triton's own is five."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def inverse_of(x):
    """``1 / x``: Triton's own division is off by up to two units, which is all that float32 is allowed, and one that
    rounds is a function that is called, beside whose registers others spilled. One step of Newton's method.
    """
    near = 1.0 / x
    return tl.fma(near, tl.fma(-x, near, 1.0), near)


@triton.jit
def statistic_at(attention, b, head, cells):
    """Where the number of a query and a head lies in (B, heads, H, W)."""
    row = (b * attention.heads.count + head).to(tl.int64) * attention.terms.height + cells.y
    return row * attention.terms.width + cells.x


@triton.jit
def of_head(statistic, head, HEADS: tl.constexpr):
    """Column ``head`` of (queries, HEADS)."""
    return tl.sum(tl.where((tl.arange(0, HEADS) == head)[None, :], statistic, 0.0), axis=1)


@triton.jit
def statistics_of(attention, b, mine, tiles, i, j, HEADS: tl.constexpr, WHOLE_D: tl.constexpr, BLOCK_D: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Every head's largest score and sum of exponentials, (queries, HEADS) both, in one pass over a tile's keys."""
    peaks = tl.full((CELLS, HEADS), float("-inf"), dtype=tl.float32)
    totals = tl.zeros((CELLS, HEADS), dtype=tl.float32)
    for step in range(bound(steps_of(tiles, i, j))):
        read = partners_of(tiles, i, j, step)
        term = terms_of(attention, 0, mine, read, False) if attention.terms.bias_rows is None else None
        for head in range(bound(attention.heads.count)):
            s = scores_of(attention, b, head, mine, read, term, False, WHOLE_D, BLOCK_D, PRECISION)
            largest, total = of_head(peaks, head, HEADS), of_head(totals, head, HEADS)
            peak = tl.maximum(largest, tl.max(s, axis=1))
            shift = shift_of(peak)
            total = total * exponential_of(largest - shift) + tl.sum(exponential_of(s - shift[:, None]), axis=1)
            own = (tl.arange(0, HEADS) == head)[None, :]
            peaks, totals = tl.where(own, peak[:, None], peaks), tl.where(own, total[:, None], totals)
    return peaks, totals


if launch.INTERPRETED:

    @triton.jit
    def inverse_of(x):
        """In the interpreter, which divides with a rounding and rounds twice in a multiply-add."""
        return 1.0 / x
