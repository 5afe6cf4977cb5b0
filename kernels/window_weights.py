"""Softmax weights of a tile of queries and a chunk of keys, which every pass of window attention forms again.

A tile of queries is a row block times a column block of :mod:`murf_fast.tables.query_blocks`: at most 8 x 8 queries,
listed in any order, that read nearly the same keys. Its keys are the rows that any of its rows reads times the columns
that any of its columns reads, walked in chunks. Whether a query reads a key, and how often it counts it, are two
logarithms that its score gets, one of the rows and one of the columns; -inf outside the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.kernels.launch import Map, map_of
from murf_fast.tables.query_blocks import AxisBlocks, blocks_of, log_multiplicity


class Lists(NamedTuple):
    """Lists of rows and of columns; list i is items[begin[i] : begin[i + 1]]. Cells (i, j) are the pairs of row list i
    and column list j.
    """

    begin_y: Tensor
    items_y: Tensor
    begin_x: Tensor
    items_x: Tensor


class Cells(NamedTuple):
    """Some cells of a grid: vectors of rows, columns, and whether the cell exists."""

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
    """How channels divide. ``dim``: channels of q and k of a head; ``channels``: of v; ``groups``: 1 when every head
    weighs all channels of v, else the number of heads; ``scale``: of the scores.
    """

    count: int
    dim: int
    channels: int
    groups: int
    scale: float


class Attention(NamedTuple):
    """The arguments of every pass."""

    q: Map
    k: Map
    v: Map
    terms: Terms
    heads: Heads


class Softmax(NamedTuple):
    """Largest score and sum of exponentials per query and head, (B, heads, H, W) float32. Their logarithm alone, as
    large as the scores, would round the weights by as much.
    """

    largest: Tensor
    total: Tensor


@dataclass(frozen=True)
class AttentionTile:
    """Queries and keys of one matrix product, how many channels of each map are read at a time; warps and registers a
    thread at most.
    """

    queries: int
    keys: int
    head_dim: int
    channels: int
    warps: int
    registers: int


def attention_tile(queries: int, head_dim: int, channels: int) -> AttentionTile:
    """One block of queries, keys in chunks of 32; 16 is the least a matrix product takes.

    64 queries on four warps spilled when compiled for sm_90, in float32 and in half precision; eight warps hold them.
    """
    block = max(launch.power_of_two(queries), 16)
    return AttentionTile(
        block,
        32,
        min(max(launch.power_of_two(head_dim), 16), 64),
        min(max(launch.power_of_two(channels), 16), 64),
        8 if block > 16 else 4,
        255,
    )


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
        self.rule, self.device = rule, q.device
        self.out, self.grid = tuple(q.shape[2:]), tuple(k.shape[2:])
        rows, columns = blocks_of(*rule, self.out, self.grid)
        self.queries, self.keys = _lists(rows, columns, q.device)
        logs = [log_multiplicity(spec, o, n, q.device) for spec, o, n in zip(rule, self.out, self.grid, strict=True)]
        terms = Terms(*logs, bias_y, bias_x, *self.out, *self.grid)
        head_dim, channels, groups = q.shape[1] // heads, v.shape[1], 1 if mean else heads
        sizes = Heads(heads, head_dim, channels, groups, scale)
        self.attention = Attention(map_of(q), map_of(k), map_of(v), terms, sizes)
        self.tile = attention_tile(rows.max_members * columns.max_members, head_dim, channels // groups)
        self.batch, self.tiles = q.shape[0], (len(rows), len(columns))
        # Programs of launches: tiles of queries in all images; blocks of a head's channels; blocks of a group's.
        self.query_tiles = self.batch * len(rows) * len(columns)
        self.d_tiles = triton.cdiv(head_dim, self.tile.head_dim)
        self.c_tiles = triton.cdiv(channels // groups, self.tile.channels)

    def statistic(self) -> Tensor:
        """Room for a number per query and head."""
        like = self.attention.q.data
        return like.new_empty((self.batch, self.attention.heads.count, *self.out), dtype=torch.float32)

    def options(self, keys: int | None = None) -> dict:
        """Options of a launch; ``keys`` at a time where the tile's number does not suit."""
        return {
            "QUERIES": self.tile.queries,
            "KEYS": keys or self.tile.keys,
            "BLOCK_D": self.tile.head_dim,
            "PRECISION": launch.dot_precision(),
            "num_warps": self.tile.warps,
            "maxnreg": self.tile.registers,
        }


def _lists(rows: AxisBlocks, columns: AxisBlocks, device: torch.device) -> tuple[Lists, Lists]:
    """Queries and keys of the tiles."""
    y, x = rows.on(device), columns.on(device)
    return Lists(*y[:2], *x[:2]), Lists(*y[2:], *x[2:])


@triton.jit
def count_of(lists, i, j):
    ny = tl.load(lists.begin_y + i + 1) - tl.load(lists.begin_y + i)
    return ny * (tl.load(lists.begin_x + j + 1) - tl.load(lists.begin_x + j))


@triton.jit
def cells_of(lists, i, j, start, BLOCK: tl.constexpr):
    """Cells start .. start + BLOCK of row list i and column list j."""
    y_begin, x_begin = tl.load(lists.begin_y + i), tl.load(lists.begin_x + j)
    ny, nx = tl.load(lists.begin_y + i + 1) - y_begin, tl.load(lists.begin_x + j + 1) - x_begin
    at = start + tl.arange(0, BLOCK)
    inside = at < ny * nx
    y = tl.load(lists.items_y + y_begin + at // nx, mask=inside, other=0)
    x = tl.load(lists.items_x + x_begin + at % nx, mask=inside, other=0)
    return Cells(y, x, inside)


@triton.jit
def _pointers(map, b, cells, c):
    """Of channels c of the cells, (cells, channels)."""
    pixels = map.data + b.to(tl.int64) * map.stride_b
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
def products_of(left, right, b, left_cells, right_cells, first, end, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                BLOCK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Products of the cells of two maps over channels [first, end), (LEFT, RIGHT) float32."""
    total = tl.zeros((LEFT, RIGHT), dtype=tl.float32)
    c = first
    while c < end:
        a = load_cells(left, b, left_cells, c, end, BLOCK)
        other = load_cells(right, b, right_cells, c, end, BLOCK)
        total = tl.dot(a, tl.trans(other), total, input_precision=PRECISION)
        c += BLOCK
    return total


@triton.jit
def scores_of(attention, b, head, queries, keys, QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """Scores of one head, (QUERIES, KEYS); -inf where a query does not read a key."""
    valid = queries.inside[:, None] & keys.inside[None, :]
    at_y = queries.y[:, None] * attention.terms.key_height + keys.y[None, :]
    at_x = queries.x[:, None] * attention.terms.key_width + keys.x[None, :]
    term = tl.load(attention.terms.rows + at_y, mask=valid, other=float("-inf"))
    term += tl.load(attention.terms.columns + at_x, mask=valid, other=float("-inf"))
    if attention.terms.bias_rows is not None:
        rows = attention.terms.bias_rows + head.to(tl.int64) * attention.terms.height * attention.terms.key_height
        columns = attention.terms.bias_columns + head.to(tl.int64) * attention.terms.width * attention.terms.key_width
        bias = tl.load(rows + at_y, mask=valid, other=0.0) + tl.load(columns + at_x, mask=valid, other=0.0)
        term = tl.where(term == float("-inf"), term, term + bias)
    first = head * attention.heads.dim
    products = products_of(attention.q, attention.k, b, queries, keys, first, first + attention.heads.dim,
                           QUERIES, KEYS, BLOCK_D, PRECISION)  # fmt: skip
    return tl.where(term == float("-inf"), float("-inf"), products * attention.heads.scale + term)


@triton.jit
def statistic_at(attention, b, head, cells):
    """Where the number of a query and a head lies in (B, heads, H, W)."""
    row = (b * attention.heads.count + head).to(tl.int64) * attention.terms.height + cells.y
    return row * attention.terms.width + cells.x


@triton.jit
def weights_of(attention, softmax, b, head, queries, keys, QUERIES: tl.constexpr, KEYS: tl.constexpr,
               BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Softmax weights of one head, (QUERIES, KEYS) float32; 0 outside the tile."""
    s = scores_of(attention, b, head, queries, keys, QUERIES, KEYS, BLOCK_D, PRECISION)
    at = statistic_at(attention, b, head, queries)
    largest = tl.load(softmax.largest + at, mask=queries.inside, other=0.0)
    total = tl.load(softmax.total + at, mask=queries.inside, other=1.0)
    weights = tl.exp(s - largest[:, None]) / total[:, None]
    return tl.where(queries.inside[:, None] & keys.inside[None, :], weights, 0.0)


@triton.jit
def mean_weights(attention, softmax, b, group, queries, keys, QUERIES: tl.constexpr, KEYS: tl.constexpr,
                 BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The weights that a group's channels get, the mean of its heads': (QUERIES, KEYS) float32."""
    share = attention.heads.count // attention.heads.groups
    total = tl.zeros((QUERIES, KEYS), dtype=tl.float32)
    head = group * share
    while head < (group + 1) * share:
        total += weights_of(attention, softmax, b, head, queries, keys, QUERIES, KEYS, BLOCK_D, PRECISION)
        head += 1
    return total / share


@triton.jit
def tile_of(program, y_tiles, x_tiles):
    """(image, row of tiles, column of tiles)"""
    return program // x_tiles // y_tiles, program // x_tiles % y_tiles, program % x_tiles
