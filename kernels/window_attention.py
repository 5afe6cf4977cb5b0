"""Window attention and its gradients on tiles of queries that share keys; no scores in memory.

Tiles come from the tables of :mod:`murf_fast.tables.query_blocks`: lists of rows and columns whose pairs are the cells
of a tile. What a query may read is in the scores' terms: the logarithm of how often it counts a key's row and column.
A softmax's denominators are found first, so that a program for any group of channels can form the weights alone.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.tables.query_blocks import AxisBlocks, blocks_of, log_multiplicity
from murf_fast.windows import axis_window

__all__ = ["window_attention", "window_attention_backward"]

# Keys that one program sums gradients for: a tile along a row of the key grid, the shortest side of a tensor core.
KEYS = 16


class Lists(NamedTuple):
    """Lists of rows and of columns; list i is items[begin[i] : begin[i + 1]]."""

    begin_y: Tensor
    items_y: Tensor
    begin_x: Tensor
    items_x: Tensor


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


@triton.jit
def _size(lists, i, j):
    ny = tl.load(lists[0] + i + 1) - tl.load(lists[0] + i)
    return ny * (tl.load(lists[2] + j + 1) - tl.load(lists[2] + j))


@triton.jit
def _cells(lists, i, j, start, BLOCK: tl.constexpr):
    """Rows, columns and validity of cells start.. of the product of row list i and column list j."""
    y_begin, x_begin = tl.load(lists[0] + i), tl.load(lists[2] + j)
    ny, nx = tl.load(lists[0] + i + 1) - y_begin, tl.load(lists[2] + j + 1) - x_begin
    at = start + tl.arange(0, BLOCK)
    inside = at < ny * nx
    y = tl.load(lists[1] + y_begin + at // nx, mask=inside, other=0)
    x = tl.load(lists[3] + x_begin + at % nx, mask=inside, other=0)
    return y, x, inside


@triton.jit
def _pointers(map, b, y, x):
    """Of channel 0; a map is (data, stride_b, stride_c, stride_y, stride_x)."""
    return map[0] + b.to(tl.int64) * map[1] + y.to(tl.int64) * map[3] + x.to(tl.int64) * map[4]


@triton.jit
def _load(map, b, y, x, inside, first, end, BLOCK: tl.constexpr):
    """Channels first.. (below end) of cells, (cells, BLOCK)."""
    c = first + tl.arange(0, BLOCK)
    pointers = _pointers(map, b, y, x)[:, None] + (c.to(tl.int64) * map[2])[None, :]
    return tl.load(pointers, mask=inside[:, None] & (c < end)[None, :], other=0.0)


@triton.jit
def _store(map, b, y, x, inside, first, end, values, BLOCK: tl.constexpr):
    c = first + tl.arange(0, BLOCK)
    pointers = _pointers(map, b, y, x)[:, None] + (c.to(tl.int64) * map[2])[None, :]
    tl.store(pointers, values.to(map[0].dtype.element_ty), mask=inside[:, None] & (c < end)[None, :])


@triton.jit
def _products(left, right, b, ly, lx, l_inside, ry, rx, r_inside, first, end,
              LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Products of the cells of two maps over channels [first, end), (LEFT, RIGHT) float32."""
    total = tl.zeros((LEFT, RIGHT), dtype=tl.float32)
    c = first
    while c < end:
        a = _load(left, b, ly, lx, l_inside, c, end, BLOCK)
        total = tl.dot(a, tl.trans(_load(right, b, ry, rx, r_inside, c, end, BLOCK)), total, input_precision="ieee")
        c += BLOCK
    return total


@triton.jit
def _scores(q, k, terms, scale, b, head, head_dim, y, x, inside, ky, kx, k_inside,
            QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Scores of one head, (QUERIES, KEYS); -inf where a query does not read a key."""
    valid = inside[:, None] & k_inside[None, :]
    at_y, at_x = y[:, None] * terms[6] + ky[None, :], x[:, None] * terms[7] + kx[None, :]
    term = tl.load(terms[0] + at_y, mask=valid, other=float("-inf"))
    term += tl.load(terms[1] + at_x, mask=valid, other=float("-inf"))
    if terms[2] is not None:
        bias = tl.load(terms[2] + head.to(tl.int64) * terms[4] * terms[6] + at_y, mask=valid, other=0.0)
        bias += tl.load(terms[3] + head.to(tl.int64) * terms[5] * terms[7] + at_x, mask=valid, other=0.0)
        term = tl.where(term == float("-inf"), term, term + bias)
    first = head * head_dim
    products = _products(q, k, b, y, x, inside, ky, kx, k_inside, first, first + head_dim, QUERIES, KEYS, BLOCK_D)
    return tl.where(term == float("-inf"), float("-inf"), products * scale + term)


@triton.jit
def _statistic(b, head, heads, y, x, terms):
    """Where the number of a query and a head lies in (B, heads, H, W)."""
    return ((b * heads + head).to(tl.int64) * terms[4] + y) * terms[5] + x


@triton.jit
def _tile(program, y_tiles, x_tiles):
    return program // x_tiles // y_tiles, program // x_tiles % y_tiles, program % x_tiles


@triton.jit
def _window_softmax(q, k, softmax, lse, queries, keys, terms, scale, heads, head_dim, y_tiles, x_tiles,
                QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    head = tl.program_id(0) % heads
    b, i, j = _tile(tl.program_id(0) // heads, y_tiles, x_tiles)
    y, x, inside = _cells(queries, i, j, 0, QUERIES)
    largest = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    count = _size(keys, i, j)
    start = 0
    while start < count:
        ky, kx, k_inside = _cells(keys, i, j, start, KEYS)
        s = _scores(q, k, terms, scale, b, head, head_dim, y, x, inside, ky, kx, k_inside, QUERIES, KEYS, BLOCK_D)
        peak = tl.maximum(largest, tl.max(s, axis=1))
        # A chunk of -inf alone must not turn into NaN before a later chunk has a finite score.
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(s - shift[:, None]), axis=1)
        largest = peak
        start += KEYS
    at = _statistic(b, head, heads, y, x, terms)
    tl.store(softmax[0] + at, largest, mask=inside)
    tl.store(softmax[1] + at, total, mask=inside)
    if lse is not None:
        tl.store(lse + at, largest + tl.log(total), mask=inside)


@triton.jit
def _weights(q, k, softmax, terms, scale, b, head, heads, head_dim, y, x, inside, ky, kx, k_inside,
             QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Softmax weights of one head, (QUERIES, KEYS); 0 outside the tile."""
    s = _scores(q, k, terms, scale, b, head, head_dim, y, x, inside, ky, kx, k_inside, QUERIES, KEYS, BLOCK_D)
    at = _statistic(b, head, heads, y, x, terms)
    largest = tl.load(softmax[0] + at, mask=inside, other=0.0)
    total = tl.load(softmax[1] + at, mask=inside, other=1.0)
    return tl.where(inside[:, None] & k_inside[None, :], tl.exp(s - largest[:, None]) / total[:, None], 0.0)


@triton.jit
def _window_attention(q, k, v, out, softmax, queries, keys, terms, scale, heads, head_dim, channels, groups, y_tiles,
                      x_tiles, QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
                      BLOCK_C: tl.constexpr):  # fmt: skip
    """``groups`` is 1 when every head weighs all channels, else the number of heads."""
    width = channels // groups
    c_tiles = tl.cdiv(width, BLOCK_C)
    c_tile, rest = tl.program_id(0) % c_tiles, tl.program_id(0) // c_tiles
    group = rest % groups
    b, i, j = _tile(rest // groups, y_tiles, x_tiles)
    first, end = group * width + c_tile * BLOCK_C, group * width + width
    y, x, inside = _cells(queries, i, j, 0, QUERIES)
    total = tl.zeros((QUERIES, BLOCK_C), dtype=tl.float32)
    count, share = _size(keys, i, j), heads // groups
    start = 0
    while start < count:
        ky, kx, k_inside = _cells(keys, i, j, start, KEYS)
        weights = tl.zeros((QUERIES, KEYS), dtype=tl.float32)
        head = group * share
        while head < (group + 1) * share:
            weights += _weights(q, k, softmax, terms, scale, b, head, heads, head_dim, y, x, inside, ky, kx, k_inside,
                                QUERIES, KEYS, BLOCK_D)  # fmt: skip
            head += 1
        values = _load(v, b, ky, kx, k_inside, first, end, BLOCK_C)
        mean = (weights / share.to(tl.float32)).to(values.dtype)
        total = tl.dot(mean, values, total, input_precision="ieee")
        start += KEYS
    _store(out, b, y, x, inside, first, end, total, BLOCK_C)


@triton.jit
def _weight_gradients(v, grad, b, head, channels, groups, y, x, inside, ky, kx, k_inside, heads,
                      QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Gradients of one head's weights, (QUERIES, KEYS)."""
    width, share = channels // groups, heads // groups
    first = head // share * width
    products = _products(grad, v, b, y, x, inside, ky, kx, k_inside, first, first + width, QUERIES, KEYS, BLOCK_C)
    return products / share.to(tl.float32)


@triton.jit
def _window_delta(q, k, v, grad, softmax, delta, queries, keys, terms, scale, heads, head_dim, channels, groups,
                  y_tiles, x_tiles, QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_C: tl.constexpr):  # fmt: skip
    """What a softmax subtracts from the gradients of its weights: their mean under the weights."""
    head = tl.program_id(0) % heads
    b, i, j = _tile(tl.program_id(0) // heads, y_tiles, x_tiles)
    y, x, inside = _cells(queries, i, j, 0, QUERIES)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    count = _size(keys, i, j)
    start = 0
    while start < count:
        ky, kx, k_inside = _cells(keys, i, j, start, KEYS)
        p = _weights(q, k, softmax, terms, scale, b, head, heads, head_dim, y, x, inside, ky, kx, k_inside,
                     QUERIES, KEYS, BLOCK_D)  # fmt: skip
        dp = _weight_gradients(v, grad, b, head, channels, groups, y, x, inside, ky, kx, k_inside, heads,
                               QUERIES, KEYS, BLOCK_C)  # fmt: skip
        total += tl.sum(p * dp, axis=1)
        start += KEYS
    tl.store(delta + _statistic(b, head, heads, y, x, terms), total, mask=inside)


@triton.jit
def _score_gradients(q, k, v, grad, softmax, delta, grad_lse, terms, scale, b, head, heads, head_dim, channels, groups,
                     y, x, inside, ky, kx, k_inside, QUERIES: tl.constexpr, KEYS: tl.constexpr,
                     BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    p = _weights(q, k, softmax, terms, scale, b, head, heads, head_dim, y, x, inside, ky, kx, k_inside,
                 QUERIES, KEYS, BLOCK_D)  # fmt: skip
    dp = _weight_gradients(v, grad, b, head, channels, groups, y, x, inside, ky, kx, k_inside, heads,
                           QUERIES, KEYS, BLOCK_C)  # fmt: skip
    at = _statistic(b, head, heads, y, x, terms)
    dp -= tl.load(delta + at, mask=inside, other=0.0)[:, None]
    if grad_lse is not None:
        dp += tl.load(grad_lse + at, mask=inside, other=0.0)[:, None]
    return p * dp


@triton.jit
def _window_grad_q(q, k, v, grad, softmax, delta, grad_lse, result, queries, keys, terms, scale, heads, head_dim,
                   channels, groups, y_tiles, x_tiles, QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
                   BLOCK_C: tl.constexpr):  # fmt: skip
    d_tiles = tl.cdiv(head_dim, BLOCK_D)
    d_tile, rest = tl.program_id(0) % d_tiles, tl.program_id(0) // d_tiles
    head = rest % heads
    b, i, j = _tile(rest // heads, y_tiles, x_tiles)
    first, end = head * head_dim + d_tile * BLOCK_D, head * head_dim + head_dim
    y, x, inside = _cells(queries, i, j, 0, QUERIES)
    total = tl.zeros((QUERIES, BLOCK_D), dtype=tl.float32)
    count = _size(keys, i, j)
    start = 0
    while start < count:
        ky, kx, k_inside = _cells(keys, i, j, start, KEYS)
        ds = _score_gradients(q, k, v, grad, softmax, delta, grad_lse, terms, scale, b, head, heads, head_dim, channels,
                              groups, y, x, inside, ky, kx, k_inside, QUERIES, KEYS, BLOCK_D, BLOCK_C)  # fmt: skip
        # In float32: gradients may be too small for half precision.
        right = _load(k, b, ky, kx, k_inside, first, end, BLOCK_D).to(tl.float32)
        total = tl.dot(ds, right, total, input_precision="ieee")
        start += KEYS
    _store(result, b, y, x, inside, first, end, total * scale, BLOCK_D)


@triton.jit
def _own_keys(row, tile, key_width, KEYS: tl.constexpr):
    kx = tile * KEYS + tl.arange(0, KEYS)
    return tl.zeros_like(kx) + row, kx, kx < key_width


@triton.jit
def _window_grad_k(q, k, v, grad, softmax, delta, grad_lse, result, readers, terms, scale, heads, head_dim, channels,
                   groups, QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
                   BLOCK_C: tl.constexpr):  # fmt: skip
    """A tile of keys gathers from all queries that read them, in their order: deterministic."""
    d_tiles = tl.cdiv(head_dim, BLOCK_D)
    d_tile, rest = tl.program_id(0) % d_tiles, tl.program_id(0) // d_tiles
    head = rest % heads
    b, i, j = _tile(rest // heads, terms[6], tl.cdiv(terms[7], KEYS))
    first, end = head * head_dim + d_tile * BLOCK_D, head * head_dim + head_dim
    ky, kx, k_inside = _own_keys(i, j, terms[7], KEYS)
    total = tl.zeros((KEYS, BLOCK_D), dtype=tl.float32)
    count = _size(readers, i, j)
    start = 0
    while start < count:
        y, x, inside = _cells(readers, i, j, start, QUERIES)
        ds = _score_gradients(q, k, v, grad, softmax, delta, grad_lse, terms, scale, b, head, heads, head_dim, channels,
                              groups, y, x, inside, ky, kx, k_inside, QUERIES, KEYS, BLOCK_D, BLOCK_C)  # fmt: skip
        right = _load(q, b, y, x, inside, first, end, BLOCK_D).to(tl.float32)
        total = tl.dot(tl.trans(ds), right, total, input_precision="ieee")
        start += QUERIES
    _store(result, b, ky, kx, k_inside, first, end, total * scale, BLOCK_D)


@triton.jit
def _window_grad_v(q, k, grad, softmax, result, readers, terms, scale, heads, head_dim, channels, groups,
                   QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
                   BLOCK_C: tl.constexpr):  # fmt: skip
    width = channels // groups
    c_tiles = tl.cdiv(width, BLOCK_C)
    c_tile, rest = tl.program_id(0) % c_tiles, tl.program_id(0) // c_tiles
    group = rest % groups
    b, i, j = _tile(rest // groups, terms[6], tl.cdiv(terms[7], KEYS))
    first, end = group * width + c_tile * BLOCK_C, group * width + width
    ky, kx, k_inside = _own_keys(i, j, terms[7], KEYS)
    total = tl.zeros((KEYS, BLOCK_C), dtype=tl.float32)
    count, share = _size(readers, i, j), heads // groups
    start = 0
    while start < count:
        y, x, inside = _cells(readers, i, j, start, QUERIES)
        weights = tl.zeros((QUERIES, KEYS), dtype=tl.float32)
        head = group * share
        while head < (group + 1) * share:
            weights += _weights(q, k, softmax, terms, scale, b, head, heads, head_dim, y, x, inside, ky, kx, k_inside,
                                QUERIES, KEYS, BLOCK_D)  # fmt: skip
            head += 1
        right = _load(grad, b, y, x, inside, first, end, BLOCK_C).to(tl.float32)
        total = tl.dot(tl.trans(weights / share.to(tl.float32)), right, total, input_precision="ieee")
        start += QUERIES
    _store(result, b, ky, kx, k_inside, first, end, total, BLOCK_C)


@triton.jit
def _window_grad_bias(q, k, v, grad, softmax, delta, grad_lse, result, tiles, keys, terms, scale, batch, heads,
                      head_dim, channels, groups, other_tiles, ROWS: tl.constexpr, QUERIES: tl.constexpr,
                      KEYS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """One entry of a bias' gradient: one query row (or column), one key row (or column), all pairs across them.

    ``tiles`` and ``keys`` list single rows on this axis, and blocks on the other.
    """
    out, size = terms[4 if ROWS else 5], terms[6 if ROWS else 7]
    entry = tl.program_id(0)
    at_key, at_query, head = entry % size, entry // size % out, entry // size // out
    total = tl.zeros((QUERIES, KEYS), dtype=tl.float32)
    b = head * 0
    while b < batch:
        other = head * 0
        while other < other_tiles:
            if ROWS:
                y, x, inside = _cells(tiles, at_query, other, 0, QUERIES)
                count = _size(keys, at_key, other)
            else:
                y, x, inside = _cells(tiles, other, at_query, 0, QUERIES)
                count = _size(keys, other, at_key)
            start = 0
            while start < count:
                if ROWS:
                    ky, kx, k_inside = _cells(keys, at_key, other, start, KEYS)
                else:
                    ky, kx, k_inside = _cells(keys, other, at_key, start, KEYS)
                total += _score_gradients(q, k, v, grad, softmax, delta, grad_lse, terms, scale, b, head, heads,
                                          head_dim, channels, groups, y, x, inside, ky, kx, k_inside, QUERIES, KEYS,
                                          BLOCK_D, BLOCK_C)  # fmt: skip
                start += KEYS
            other += 1
        b += 1
    tl.store(result + entry, tl.sum(tl.sum(total, axis=1), axis=0))


def _map(x: Tensor) -> tuple:
    return (x, *x.stride())


def _lists(rows: AxisBlocks, columns: AxisBlocks, kind: str, device: torch.device) -> Lists:
    part = {"queries": slice(0, 2), "keys": slice(2, 4)}[kind]
    return Lists(*rows.on(device)[part], *columns.on(device)[part])


@functools.lru_cache(256)
def _readers(spec: str, out: int, size: int, tile: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lists of the queries along an axis that read any key of a tile of ``tile`` keys."""
    reads = axis_window(spec, out, size).multiplicity() > 0
    lists = [np.nonzero(reads[:, i : i + tile].any(1))[0] for i in range(0, size, tile)]
    begin = np.cumsum([0, *map(len, lists)])
    return tuple(torch.from_numpy(x.astype(np.int32)).to(device) for x in (begin, np.concatenate(lists)))


@functools.lru_cache(64)
def _singles(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.arange(n + 1, dtype=torch.int32, device=device), torch.arange(n, dtype=torch.int32, device=device)


class _Call:
    """What the launches of one call share."""

    def __init__(self, q, k, v, bias_y, bias_x, rule, heads, mean, scale):
        self.device = q.device
        self.out, self.grid = tuple(q.shape[2:]), tuple(k.shape[2:])
        self.rule = rule
        self.rows, self.columns = blocks_of(*rule, self.out, self.grid)
        self.queries, self.keys = (_lists(self.rows, self.columns, kind, q.device) for kind in ("queries", "keys"))
        logs = [log_multiplicity(spec, o, n, q.device) for spec, o, n in zip(rule, self.out, self.grid, strict=True)]
        self.terms = Terms(*logs, bias_y, bias_x, *self.out, *self.grid)
        self.q, self.k, self.v = _map(q), _map(k), _map(v)
        self.batch, self.scale, self.heads, self.head_dim = q.shape[0], scale, heads, q.shape[1] // heads
        self.channels, self.groups = v.shape[1], 1 if mean else heads
        queries = self.rows.max_members * self.columns.max_members
        self.tile = launch.attention_tile(queries, self.head_dim, self.channels // self.groups)
        self.tiles = (len(self.rows), len(self.columns))
        self.y_x = self.batch * len(self.rows) * len(self.columns)

    def shape(self) -> dict:
        """Options of every launch."""
        return {"QUERIES": self.tile.queries, "KEYS": self.tile.keys, "BLOCK_D": self.tile.head_dim}

    def run(self) -> dict:
        return {"num_warps": self.tile.warps, "maxnreg": self.tile.registers}

    def softmax(self, lse: Tensor | None) -> tuple[Tensor, Tensor]:
        """Largest score and sum of exponentials per query and head, (B, heads, H, W). Their logarithm alone, as large
        as the scores, would round the weights by as much.
        """
        like = self.q[0]
        largest = like.new_empty((self.batch, self.heads, *self.out), dtype=torch.float32)
        softmax = (largest, torch.empty_like(largest))
        _window_softmax[(self.y_x * self.heads,)](
            self.q, self.k, softmax, lse, self.queries, self.keys, self.terms, self.scale, self.heads, self.head_dim,
            *self.tiles, **self.shape(), **self.run(),
        )  # fmt: skip
        return softmax


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_y: Tensor | None,
    bias_x: Tensor | None,
    rule: tuple[str, str],
    heads: int,
    mean: bool,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    call = _Call(q, k, v, bias_y, bias_x, rule, heads, mean, scale)
    c_tiles = triton.cdiv(call.channels // call.groups, call.tile.channels)
    with launch.on_device_of(out):
        softmax = call.softmax(lse)
        _window_attention[(call.y_x * call.groups * c_tiles,)](
            call.q, call.k, call.v, _map(out), softmax, call.queries, call.keys, call.terms, scale, heads,
            call.head_dim, call.channels, call.groups, *call.tiles, **call.shape(), BLOCK_C=call.tile.channels,
            **call.run(),
        )  # fmt: skip


def window_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_y: Tensor | None,
    bias_x: Tensor | None,
    rule: tuple[str, str],
    heads: int,
    mean: bool,
    scale: float,
    shares: int,
    results: list[Tensor],
) -> None:
    """As :func:`murf_fast.native.window_attention_backward`; ``shares`` only concerns the CPU."""
    call = _Call(q, k, v, bias_y, bias_x, rule, heads, mean, scale)
    grad, device = _map(grad_out), q.device
    delta = q.new_empty((q.shape[0], heads, *call.out), dtype=torch.float32)
    sizes = (heads, call.head_dim, call.channels, call.groups)
    block_c = {"BLOCK_C": call.tile.channels}
    d_tiles = triton.cdiv(call.head_dim, call.tile.head_dim)
    readers = Lists(
        *_readers(rule[0], call.out[0], call.grid[0], 1, device),
        *_readers(rule[1], call.out[1], call.grid[1], KEYS, device),
    )
    key_tiles = call.batch * call.grid[0] * triton.cdiv(call.grid[1], KEYS)
    by_key = call.shape() | {"KEYS": KEYS}
    with launch.on_device_of(q):
        softmax = call.softmax(None)
        inputs = (call.q, call.k, call.v, grad, softmax, delta)
        if any(results[i].numel() for i in (0, 1, 3)):
            _window_delta[(call.y_x * heads,)](
                *inputs, call.queries, call.keys, call.terms, scale, *sizes, *call.tiles, **call.shape(), **block_c,
                **call.run(),
            )  # fmt: skip
        if results[0].numel():
            _window_grad_q[(call.y_x * heads * d_tiles,)](
                *inputs, grad_lse, _map(results[0]), call.queries, call.keys, call.terms, scale, *sizes, *call.tiles,
                **call.shape(), **block_c, **call.run(),
            )  # fmt: skip
        if results[1].numel():
            _window_grad_k[(key_tiles * heads * d_tiles,)](
                *inputs, grad_lse, _map(results[1]), readers, call.terms, scale, *sizes, **by_key,
                **block_c, **call.run(),
            )  # fmt: skip
        if results[2].numel():
            c_tiles = triton.cdiv(call.channels // call.groups, call.tile.channels)
            _window_grad_v[(key_tiles * call.groups * c_tiles,)](
                call.q, call.k, grad, softmax, _map(results[2]), readers, call.terms, scale, *sizes, **by_key,
                **block_c, **call.run(),
            )  # fmt: skip
        for axis, result in enumerate(results[3:]):
            if result.numel():
                _bias_gradient(call, axis, inputs, grad_lse, sizes, result)


def _bias_gradient(
    call: _Call, axis: int, inputs: tuple, grad_lse: Tensor | None, sizes: tuple, result: Tensor
) -> None:
    single_queries, single_keys = _singles(call.out[axis], call.device), _singles(call.grid[axis], call.device)
    other = slice(2, 4) if axis == 0 else slice(0, 2)
    parts = [(single_queries, call.queries[other]), (single_keys, call.keys[other])]
    lists = [Lists(*(own + rest if axis == 0 else rest + own)) for own, rest in parts]
    total = result if result.dtype == torch.float32 else result.new_empty(result.shape, dtype=torch.float32)
    _window_grad_bias[(result.numel(),)](
        *inputs, grad_lse, total, *lists, call.terms, call.scale, call.batch, *sizes, call.tiles[1 - axis],
        ROWS=axis == 0, QUERIES=16, KEYS=KEYS, BLOCK_D=call.tile.head_dim, BLOCK_C=call.tile.channels,
        num_warps=4, maxnreg=call.tile.registers,
    )  # fmt: skip
    if total is not result:
        result.copy_(total)
