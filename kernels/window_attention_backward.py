"""Gradients of window attention, with the weights formed again from the softmax's numbers.

For the weights P of a head, with dP the products of the result's gradients with the values (over the number of heads
that share them), ``delta = sum over keys of P dP`` and ``dS = P (dP - delta + grad_lse)``:
``grad q = scale dS k``, ``grad k = scale dS^T q``, ``grad v = P^T grad``, and the gradient of a bias sums dS.

``delta`` has a pass of its own, as the softmax has. The gradient of q is by tiles of queries like the forward. Those of
k and v are gathers: a program owns a few keys and walks all queries that read them in their order, so that nothing
depends on the order of programs.
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
from murf_fast.kernels.launch import Map, map_of
from murf_fast.kernels.window_attention import softmax_of
from murf_fast.kernels.window_weights import (
    Call,
    Cells,
    Lists,
    cells_of,
    count_of,
    load_cells,
    mean_weights,
    products_of,
    statistic_at,
    store_cells,
    tile_of,
    weights_of,
)
from murf_fast.tables._table import kept
from murf_fast.windows import axis_window

__all__ = ["window_attention_backward"]

# Keys that one program sums gradients for: a tile along a row of the key grid, the shortest side of a tensor core.
KEYS = 16


class Statistics(NamedTuple):
    """Numbers per query and head: the softmax's, ``delta``, and gradients of the log-sum-exp, if there are any."""

    largest: Tensor
    total: Tensor
    delta: Tensor
    grad_lse: Tensor | None


@triton.jit
def _weight_gradients(attention, grad, b, head, queries, keys, QUERIES: tl.constexpr, KEYS: tl.constexpr,
                      BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradients of one head's weights, (QUERIES, KEYS) float32."""
    width, share = attention.heads.channels // attention.heads.groups, attention.heads.count // attention.heads.groups
    first = head // share * width
    products = products_of(grad, attention.v, b, queries, keys, first, first + width, QUERIES, KEYS, BLOCK_C, PRECISION)
    return products / share


@triton.jit
def _score_gradients(attention, grad, statistics, b, head, queries, keys, QUERIES: tl.constexpr, KEYS: tl.constexpr,
                     BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradients of one head's scores, (QUERIES, KEYS) float32."""
    p = weights_of(attention, statistics, b, head, queries, keys, QUERIES, KEYS, BLOCK_D, PRECISION)
    dp = _weight_gradients(attention, grad, b, head, queries, keys, QUERIES, KEYS, BLOCK_C, PRECISION)
    at = statistic_at(attention, b, head, queries)
    dp -= tl.load(statistics.delta + at, mask=queries.inside, other=0.0)[:, None]
    if statistics.grad_lse is not None:
        dp += tl.load(statistics.grad_lse + at, mask=queries.inside, other=0.0)[:, None]
    return p * dp


@triton.jit
def _window_delta(attention, grad, statistics, queries, keys, y_tiles, x_tiles, QUERIES: tl.constexpr,
                  KEYS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """One tile of queries, one head: what a softmax subtracts from its weights' gradients, their mean under the
    weights.
    """
    head = tl.program_id(0) % attention.heads.count
    b, i, j = tile_of(tl.program_id(0) // attention.heads.count, y_tiles, x_tiles)
    mine = cells_of(queries, i, j, 0, QUERIES)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    count = count_of(keys, i, j)
    start = 0
    while start < count:
        read = cells_of(keys, i, j, start, KEYS)
        p = weights_of(attention, statistics, b, head, mine, read, QUERIES, KEYS, BLOCK_D, PRECISION)
        dp = _weight_gradients(attention, grad, b, head, mine, read, QUERIES, KEYS, BLOCK_C, PRECISION)
        total += tl.sum(p * dp, axis=1)
        start += KEYS
    tl.store(statistics.delta + statistic_at(attention, b, head, mine), total, mask=mine.inside)


@triton.jit
def _window_grad_q(attention, grad, statistics, result, queries, keys, y_tiles, x_tiles, QUERIES: tl.constexpr,
                   KEYS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """One tile of queries, BLOCK_D channels of one head, KEYS keys at a time."""
    d_tiles = tl.cdiv(attention.heads.dim, BLOCK_D)
    d_tile, rest = tl.program_id(0) % d_tiles, tl.program_id(0) // d_tiles
    head = rest % attention.heads.count
    b, i, j = tile_of(rest // attention.heads.count, y_tiles, x_tiles)
    first, end = head * attention.heads.dim + d_tile * BLOCK_D, (head + 1) * attention.heads.dim
    mine = cells_of(queries, i, j, 0, QUERIES)
    total = tl.zeros((QUERIES, BLOCK_D), dtype=tl.float32)
    count = count_of(keys, i, j)
    start = 0
    while start < count:
        read = cells_of(keys, i, j, start, KEYS)
        ds = _score_gradients(
            attention, grad, statistics, b, head, mine, read, QUERIES, KEYS, BLOCK_D, BLOCK_C, PRECISION
        )
        # In float32: gradients may be too small for half precision.
        right = load_cells(attention.k, b, read, first, end, BLOCK_D).to(tl.float32)
        total = tl.dot(ds, right, total, input_precision=PRECISION)
        start += KEYS
    store_cells(result, b, mine, first, end, total * attention.heads.scale, BLOCK_D)


@triton.jit
def _own_keys(attention, row, tile, KEYS: tl.constexpr):
    """Tile ``tile`` of a row of keys."""
    x = tile * KEYS + tl.arange(0, KEYS)
    return Cells(tl.zeros_like(x) + row, x, x < attention.terms.key_width)


@triton.jit
def _window_grad_k(attention, grad, statistics, result, readers, QUERIES: tl.constexpr, KEYS: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """KEYS keys of a row, BLOCK_D channels of one head, QUERIES of their readers at a time."""
    d_tiles = tl.cdiv(attention.heads.dim, BLOCK_D)
    d_tile, rest = tl.program_id(0) % d_tiles, tl.program_id(0) // d_tiles
    head = rest % attention.heads.count
    b, i, j = tile_of(
        rest // attention.heads.count, attention.terms.key_height, tl.cdiv(attention.terms.key_width, KEYS)
    )
    first, end = head * attention.heads.dim + d_tile * BLOCK_D, (head + 1) * attention.heads.dim
    mine = _own_keys(attention, i, j, KEYS)
    total = tl.zeros((KEYS, BLOCK_D), dtype=tl.float32)
    count = count_of(readers, i, j)
    start = 0
    while start < count:
        those = cells_of(readers, i, j, start, QUERIES)
        ds = _score_gradients(
            attention, grad, statistics, b, head, those, mine, QUERIES, KEYS, BLOCK_D, BLOCK_C, PRECISION
        )
        right = load_cells(attention.q, b, those, first, end, BLOCK_D).to(tl.float32)
        total = tl.dot(tl.trans(ds), right, total, input_precision=PRECISION)
        start += QUERIES
    store_cells(result, b, mine, first, end, total * attention.heads.scale, BLOCK_D)


@triton.jit
def _window_grad_v(attention, grad, statistics, result, readers, QUERIES: tl.constexpr, KEYS: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """KEYS keys of a row, BLOCK_C channels of one group, QUERIES of their readers at a time."""
    width = attention.heads.channels // attention.heads.groups
    c_tiles = tl.cdiv(width, BLOCK_C)
    c_tile, rest = tl.program_id(0) % c_tiles, tl.program_id(0) // c_tiles
    group = rest % attention.heads.groups
    b, i, j = tile_of(
        rest // attention.heads.groups, attention.terms.key_height, tl.cdiv(attention.terms.key_width, KEYS)
    )
    first, end = group * width + c_tile * BLOCK_C, group * width + width
    mine = _own_keys(attention, i, j, KEYS)
    total = tl.zeros((KEYS, BLOCK_C), dtype=tl.float32)
    count = count_of(readers, i, j)
    start = 0
    while start < count:
        those = cells_of(readers, i, j, start, QUERIES)
        weights = mean_weights(attention, statistics, b, group, those, mine, QUERIES, KEYS, BLOCK_D, PRECISION)
        right = load_cells(grad, b, those, first, end, BLOCK_C).to(tl.float32)
        total = tl.dot(tl.trans(weights), right, total, input_precision=PRECISION)
        start += QUERIES
    store_cells(result, b, mine, first, end, total, BLOCK_C)


@triton.jit
def _window_grad_bias(attention, grad, statistics, result, tiles, keys, batch, other_tiles, ROWS: tl.constexpr,
                      QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
                      PRECISION: tl.constexpr):  # fmt: skip
    """One entry of a bias' gradient: one query row (or column), one key row (or column), all pairs across them.

    ``tiles`` and ``keys`` list single rows on this axis, and blocks on the other.
    """
    if ROWS:
        out, size = attention.terms.height, attention.terms.key_height
    else:
        out, size = attention.terms.width, attention.terms.key_width
    entry = tl.program_id(0)
    at_key, at_query, head = entry % size, entry // size % out, entry // size // out
    total = tl.zeros((QUERIES, KEYS), dtype=tl.float32)
    b = head * 0
    while b < batch:
        other = head * 0
        while other < other_tiles:
            if ROWS:
                mine = cells_of(tiles, at_query, other, 0, QUERIES)
                count = count_of(keys, at_key, other)
            else:
                mine = cells_of(tiles, other, at_query, 0, QUERIES)
                count = count_of(keys, other, at_key)
            start = 0
            while start < count:
                if ROWS:
                    read = cells_of(keys, at_key, other, start, KEYS)
                else:
                    read = cells_of(keys, other, at_key, start, KEYS)
                total += _score_gradients(attention, grad, statistics, b, head, mine, read, QUERIES, KEYS, BLOCK_D,
                                          BLOCK_C, PRECISION)  # fmt: skip
                start += KEYS
            other += 1
        b += 1
    tl.store(result + entry, tl.sum(tl.sum(total, axis=1), axis=0))


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
    """``results``: gradients of q, k, v (any strides) and of the biases; an empty one is not wanted. ``shares`` only
    concerns the CPU.
    """
    call = Call(q, k, v, bias_y, bias_x, rule, heads, mean, scale)
    attention, by_query = call.attention, (call.queries, call.keys, *call.tiles)
    options, by_key = call.options(), call.options(KEYS)
    options["BLOCK_C"] = by_key["BLOCK_C"] = call.tile.channels
    readers = Lists(
        *_readers(rule[0], call.out[0], call.grid[0], 1, call.device),
        *_readers(rule[1], call.out[1], call.grid[1], KEYS, call.device),
    )
    key_tiles = call.batch * call.grid[0] * triton.cdiv(call.grid[1], KEYS)
    grad_q, grad_k, grad_v, *grad_biases = results
    with launch.on_device_of(q):
        grad, statistics = map_of(grad_out), Statistics(*softmax_of(call), call.statistic(), grad_lse)
        if any(wanted.numel() for wanted in (grad_q, grad_k, *grad_biases)):
            _window_delta[(call.query_tiles * heads,)](attention, grad, statistics, *by_query, **options)
        if grad_q.numel():
            _window_grad_q[(call.query_tiles * heads * call.d_tiles,)](
                attention, grad, statistics, map_of(grad_q), *by_query, **options
            )
        if grad_k.numel():
            _window_grad_k[(key_tiles * heads * call.d_tiles,)](
                attention, grad, statistics, map_of(grad_k), readers, **by_key
            )
        if grad_v.numel():
            _window_grad_v[(key_tiles * attention.heads.groups * call.c_tiles,)](
                attention, grad, statistics, map_of(grad_v), readers, **by_key
            )
        for axis, result in enumerate(grad_biases):
            if result.numel():
                _bias_gradient(call, grad, statistics, axis, result, by_key)


def _bias_gradient(call: Call, grad: Map, statistics: Statistics, axis: int, result: Tensor, options: dict) -> None:
    queries, keys = _singles(call.out[axis], call.device), _singles(call.grid[axis], call.device)
    if axis == 0:
        lists = Lists(*queries, *call.queries[2:]), Lists(*keys, *call.keys[2:])
    else:
        lists = Lists(*call.queries[:2], *queries), Lists(*call.keys[:2], *keys)
    total = result if result.dtype == torch.float32 else result.new_empty(result.shape, dtype=torch.float32)
    _window_grad_bias[(result.numel(),)](
        call.attention, grad, statistics, total, *lists, call.batch, call.tiles[1 - axis], ROWS=axis == 0,
        **options | {"QUERIES": 16, "num_warps": 4},
    )  # fmt: skip
    if total is not result:
        result.copy_(total)


def _readers(spec: str, out: int, size: int, tile: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lists of the queries along an axis that read any key of a tile of ``tile`` keys."""
    return kept(device, ("readers", spec, out, size, tile), _cached_readers(spec, out, size, tile, device))


@functools.lru_cache(256)
def _cached_readers(spec: str, out: int, size: int, tile: int, device: torch.device) -> tuple[Tensor, Tensor]:
    reads = axis_window(spec, out, size).multiplicity() > 0
    lists = [np.nonzero(reads[:, i : i + tile].any(1))[0] for i in range(0, size, tile)]
    begin = np.cumsum([0, *map(len, lists)])
    return tuple(torch.from_numpy(x.astype(np.int32)).to(device) for x in (begin, np.concatenate(lists)))


def _singles(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lists of one number each: 0, 1, ..."""
    return kept(device, ("singles", n), _cached_singles(n, device))


@functools.lru_cache(64)
def _cached_singles(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.arange(n + 1, dtype=torch.int32, device=device), torch.arange(n, dtype=torch.int32, device=device)
