"""Gradients of window attention, with the weights formed again from the softmax's numbers.

For the weights P of a head, with dP the products of the result's gradients with the values (over the number of heads
that share them), ``delta = sum over keys of P dP - grad_lse`` and ``dS = P (dP - delta)``:
``grad q = scale dS k``, ``grad k = scale dS^T q``, ``grad v = P^T grad``, and the gradient of a bias sums dS.

The gradient of q is by tiles of queries like the forward, and leaves the softmax's numbers and ``delta`` for the rest.
Those of k and v are gathers: a program owns a tile of keys and walks the queries that read them, or a share of them, in
their order, so that nothing depends on the order of programs. It forms the scores transposed, so that they are the left
factor of a product as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.launch import Map, bound, map_of
from murf_fast.kernels.window_weights import (
    CELLS,
    SIDE,
    Call,
    Heads,
    block_of,
    exponential_of,
    inverse_of,
    load_cells,
    members_of,
    partners_of,
    products_of,
    scores_of,
    shift_of,
    statistic_at,
    steps_of,
    store_cells,
    terms_of,
    tile_of,
    tiles_of,
)

__all__ = ["window_attention_backward"]


class Statistics(NamedTuple):
    """Numbers per query and head, (B, heads, H, W) float32: the largest score, one over the sum of exponentials, and
    ``delta`` (None: not wanted). The logarithm of the sums alone, as large as the scores, would round the weights by as
    much.
    """

    largest: Tensor
    factor: Tensor
    delta: Tensor | None


@dataclass(frozen=True)
class GradientTile:
    """Channels of a result that a program holds: of q and k, of v; and of what it reads at a time; warps of a program
    of queries, and of one of keys; whether products of float32 are made in parts.
    """

    result_d: int
    result_c: int
    head_dim: int
    channels: int
    warps: int
    key_warps: int
    in_parts: bool


def gradient_tile(heads: Heads, mean: bool, dtype: torch.dtype, architecture: int) -> GradientTile:
    """Scores and their gradients are 64 registers of a thread of four warps, results beside them up to 64 more: more of
    them, or four warps for the programs of keys, or for any of float32 in parts, spilled when compiled for sm_90 and
    sm_100. Without warp groups the parts alone were too many.
    """
    dim, in_parts = block_of(heads.dim, 32), not launch.without_warp_groups(architecture)
    if dtype == torch.float32:
        return GradientTile(dim, block_of(heads.width, 32), block_of(heads.dim, 16), 16, 8, 8, in_parts)
    width = block_of(heads.width, 128 if mean else 64)
    if dtype == torch.float16:  # its gradients of scores are multiplied in float32
        return GradientTile(dim, width, dim, 32, 8, 8, in_parts)
    return GradientTile(block_of(heads.dim, 64), width, dim, block_of(heads.width, 32), 4, 8, in_parts)


@triton.jit
def _product(factor, cells, total, PRECISION: tl.constexpr):
    """``total`` plus gradients of scores times channels of cells; gradients may be too small for float16."""
    if cells.dtype == tl.float16:
        cells = cells.to(tl.float32)
    return tl.dot(factor.to(cells.dtype), cells, total, input_precision=PRECISION)


@triton.jit
def _weight_gradients(attention, grad, b, head, mine, partners, SHARED: tl.constexpr, OF_KEYS: tl.constexpr,
                      BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradients of one head's weights, (mine, partners); all heads have the same if they share the values."""
    width = attention.heads.width
    first = 0 if SHARED else head * width
    own, other = grad, attention.v
    if OF_KEYS:
        own, other = attention.v, grad
    products = products_of(own, other, b, mine, partners, first, first + width, False, BLOCK_C, PRECISION)
    return products / attention.heads.count if SHARED else products


@triton.jit
def _save(attention, grad_lse, statistics, b, head, mine, largest, factor, delta):
    """Stores a head's numbers, and returns ``delta`` of the gradients of weights and log-sum-exps."""
    at = statistic_at(attention, b, head, mine)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + at, mask=mine.inside, other=0.0)
    tl.store(statistics.largest + at, largest, mask=mine.inside)
    tl.store(statistics.factor + at, factor, mask=mine.inside)
    if statistics.delta is not None:
        tl.store(statistics.delta + at, delta, mask=mine.inside)
    return delta


@kernel
def _window_grad_q_of_heads(attention, grad, grad_lse, statistics, result, tiles, y_tiles, x_tiles,
                            WHOLE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
                            PRECISION: tl.constexpr):  # fmt: skip
    """One tile of queries with at most 64 keys, all heads, which share the gradients of their weights."""
    heads = attention.heads
    b, i, j = tile_of(tl.program_id(0), y_tiles, x_tiles)
    mine, read = members_of(tiles, i, j), partners_of(tiles, i, j, 0)
    term = terms_of(attention, 0, mine, read, False) if attention.terms.bias_rows is None else None
    dp = tl.zeros((CELLS, CELLS), dtype=tl.float32)
    if statistics.delta is not None:
        dp = _weight_gradients(attention, grad, b, 0, mine, read, True, False, BLOCK_C, PRECISION)
    for head in range(bound(heads.count)):
        s = scores_of(attention, b, head, mine, read, term, False, WHOLE_D, BLOCK_D, PRECISION)
        largest = tl.max(s, axis=1)
        p = exponential_of(s - shift_of(largest)[:, None])
        factor = inverse_of(tl.sum(p, axis=1))
        p *= factor[:, None]
        delta = _save(attention, grad_lse, statistics, b, head, mine, largest, factor, tl.sum(p * dp, axis=1))
        if result is not None:
            ds = p * (dp - delta[:, None]) * heads.scale
            for d in range(0, bound(heads.dim), BLOCK_D):
                first, end = head * heads.dim + d, (head + 1) * heads.dim
                zero = tl.zeros((CELLS, BLOCK_D), dtype=tl.float32)
                value = _product(ds, load_cells(attention.k, b, read, first, end, BLOCK_D), zero, PRECISION)
                store_cells(result, b, mine, first, end, value, BLOCK_D)


@kernel
def _window_grad_q(attention, grad, grad_lse, statistics, result, tiles, y_tiles, x_tiles, SHARED: tl.constexpr,
                   RESULT_D: tl.constexpr, WHOLE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """One tile of queries, one head: its numbers, then its gradient."""
    heads = attention.heads
    head = tl.program_id(0) % heads.count
    b, i, j = tile_of(tl.program_id(0) // heads.count, y_tiles, x_tiles)
    mine, steps = members_of(tiles, i, j), steps_of(tiles, i, j)
    largest = tl.full((CELLS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((CELLS,), dtype=tl.float32)
    delta = tl.zeros((CELLS,), dtype=tl.float32)
    for step in range(bound(steps)):
        read = partners_of(tiles, i, j, step)
        s = scores_of(attention, b, head, mine, read, None, False, WHOLE_D, BLOCK_D, PRECISION)
        peak = tl.maximum(largest, tl.max(s, axis=1))
        shift = shift_of(peak)
        p, before = exponential_of(s - shift[:, None]), exponential_of(largest - shift)
        total = total * before + tl.sum(p, axis=1)
        if statistics.delta is not None:
            dp = _weight_gradients(attention, grad, b, head, mine, read, SHARED, False, BLOCK_C, PRECISION)
            delta = delta * before + tl.sum(p * dp, axis=1)
        largest = peak
    factor = inverse_of(total)
    delta = _save(attention, grad_lse, statistics, b, head, mine, largest, factor, delta * factor)
    if result is not None:
        for d in range(0, bound(heads.dim), RESULT_D):
            first, end = head * heads.dim + d, (head + 1) * heads.dim
            value = tl.zeros((CELLS, RESULT_D), dtype=tl.float32)
            for step in range(bound(steps)):
                read = partners_of(tiles, i, j, step)
                s = scores_of(attention, b, head, mine, read, None, False, WHOLE_D, BLOCK_D, PRECISION)
                p = exponential_of(s - shift_of(largest)[:, None]) * factor[:, None]
                dp = _weight_gradients(attention, grad, b, head, mine, read, SHARED, False, BLOCK_C, PRECISION)
                keys = load_cells(attention.k, b, read, first, end, RESULT_D)
                value = _product(p * (dp - delta[:, None]), keys, value, PRECISION)
            store_cells(result, b, mine, first, end, value * heads.scale, RESULT_D)


@triton.jit
def _weights_of(attention, statistics, b, head, mine, partners, term, OF_KEYS: tl.constexpr, WHOLE_D: tl.constexpr,
                BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Weights of one head, (mine, partners), from the numbers that the gradient of q has left."""
    s = scores_of(attention, b, head, mine, partners, term, OF_KEYS, WHOLE_D, BLOCK_D, PRECISION)
    if OF_KEYS:
        at = statistic_at(attention, b, head, partners)
        largest = tl.load(statistics.largest + at, mask=partners.inside, other=0.0)[None, :]
        factor = tl.load(statistics.factor + at, mask=partners.inside, other=1.0)[None, :]
    else:
        at = statistic_at(attention, b, head, mine)
        largest = tl.load(statistics.largest + at, mask=mine.inside, other=0.0)[:, None]
        factor = tl.load(statistics.factor + at, mask=mine.inside, other=1.0)[:, None]
    return exponential_of(s - largest) * factor


@triton.jit
def _share_of(steps, share, shares):
    """The steps of a share: begin and end."""
    return steps * share // shares, steps * (share + 1) // shares


@kernel
def _window_grad_k(attention, grad, statistics, grad_k, grad_v, tiles, y_tiles, x_tiles, batch, shares,
                   SHARED: tl.constexpr, RESULT_D: tl.constexpr, RESULT_C: tl.constexpr, WHOLE_D: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tile of keys, RESULT_D channels of one head, a share of their readers; with ``grad_v``, where these are all
    its channels, also the head's values.
    """
    heads = attention.heads
    share, rest = tl.program_id(0) % shares, tl.program_id(0) // shares
    d_tiles = tl.cdiv(heads.dim, RESULT_D)
    d_tile, rest = rest % d_tiles, rest // d_tiles
    head = rest % heads.count
    b, i, j = tile_of(rest // heads.count, y_tiles, x_tiles)
    mine = members_of(tiles, i, j)
    first, end = head * heads.dim + d_tile * RESULT_D, (head + 1) * heads.dim
    keys = tl.zeros((CELLS, RESULT_D), dtype=tl.float32)
    if grad_v is not None:
        values = tl.zeros((CELLS, RESULT_C), dtype=tl.float32)
    begin, stop = _share_of(steps_of(tiles, i, j), share, shares)
    for step in range(bound(begin), bound(stop)):
        those = partners_of(tiles, i, j, step)
        p = _weights_of(attention, statistics, b, head, mine, those, None, True, WHOLE_D, BLOCK_D, PRECISION)
        dp = _weight_gradients(attention, grad, b, head, mine, those, SHARED, True, BLOCK_C, PRECISION)
        at = statistic_at(attention, b, head, those)
        delta = tl.load(statistics.delta + at, mask=those.inside, other=0.0)
        queries = load_cells(attention.q, b, those, first, end, RESULT_D)
        keys = _product(p * (dp - delta[None, :]), queries, keys, PRECISION)
        if grad_v is not None:
            weighed = load_cells(grad, b, those, head * heads.width, (head + 1) * heads.width, RESULT_C)
            values = tl.dot(p.to(weighed.dtype), weighed, values, input_precision=PRECISION)
    store_cells(grad_k, share * batch + b, mine, first, end, keys * heads.scale, RESULT_D)
    if grad_v is not None:
        store_cells(grad_v, share * batch + b, mine, head * heads.width, (head + 1) * heads.width, values, RESULT_C)


@kernel
def _window_grad_v(attention, grad, statistics, result, tiles, y_tiles, x_tiles, batch, shares, SHARED: tl.constexpr,
                   RESULT_C: tl.constexpr, WHOLE_D: tl.constexpr, BLOCK_D: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """One tile of keys, RESULT_C channels of all heads or of one, a share of their readers."""
    heads = attention.heads
    share, rest = tl.program_id(0) % shares, tl.program_id(0) // shares
    c_tiles = tl.cdiv(heads.width, RESULT_C)
    c_tile, rest = rest % c_tiles, rest // c_tiles
    group = 0
    if not SHARED:
        group, rest = rest % heads.count, rest // heads.count
    b, i, j = tile_of(rest, y_tiles, x_tiles)
    mine = members_of(tiles, i, j)
    first, end = group * heads.width + c_tile * RESULT_C, (group + 1) * heads.width
    total = tl.zeros((CELLS, RESULT_C), dtype=tl.float32)
    begin, stop = _share_of(steps_of(tiles, i, j), share, shares)
    for step in range(bound(begin), bound(stop)):
        those = partners_of(tiles, i, j, step)
        if SHARED:
            term = terms_of(attention, 0, mine, those, True) if attention.terms.bias_rows is None else None
            p = tl.zeros((CELLS, CELLS), dtype=tl.float32)
            for head in range(bound(heads.count)):
                p += _weights_of(attention, statistics, b, head, mine, those, term, True, WHOLE_D, BLOCK_D, PRECISION)
        else:
            p = _weights_of(attention, statistics, b, group, mine, those, None, True, WHOLE_D, BLOCK_D, PRECISION)
        weighed = load_cells(grad, b, those, first, end, RESULT_C)
        total = tl.dot(p.to(weighed.dtype), weighed, total, input_precision=PRECISION)
    if SHARED:
        total *= 1.0 / heads.count
    store_cells(result, share * batch + b, mine, first, end, total, RESULT_C)


@kernel
def _window_grad_bias(attention, grad, statistics, result, tiles, own_steps, other_tiles, batch, ROWS: tl.constexpr,
                      SHARED: tl.constexpr, WHOLE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
                      PRECISION: tl.constexpr):  # fmt: skip
    """Eight query rows and eight of the key rows they read, one head (or columns): all pairs across them."""
    heads, terms = attention.heads, attention.terms
    step, rest = tl.program_id(0) % own_steps, tl.program_id(0) // own_steps
    head, tile = rest % heads.count, rest // heads.count
    side = tl.arange(0, SIDE)
    if ROWS:
        own = tl.load(tiles.members_y + tile * SIDE + side)
        partners = tl.load(tiles.partners_y + tile * tiles.pitch_y + step * SIDE + side)
        out, size = terms.height, terms.key_height
    else:
        own = tl.load(tiles.members_x + tile * SIDE + side)
        partners = tl.load(tiles.partners_x + tile * tiles.pitch_x + step * SIDE + side)
        out, size = terms.width, terms.key_width
    total = tl.zeros((CELLS, CELLS), dtype=tl.float32)
    for b in range(bound(batch)):
        for other in range(bound(other_tiles)):
            i, j = tile, other
            if not ROWS:
                i, j = other, tile
            mine = members_of(tiles, i, j)
            at = statistic_at(attention, b, head, mine)
            delta = tl.load(statistics.delta + at, mask=mine.inside, other=0.0)
            columns = tl.load(tiles.steps_x + j)
            for n in range(bound(columns if ROWS else tl.load(tiles.steps_y + i))):
                read = partners_of(tiles, i, j, step * columns + n if ROWS else n * columns + step)
                p = _weights_of(attention, statistics, b, head, mine, read, None, False, WHOLE_D, BLOCK_D, PRECISION)
                dp = _weight_gradients(attention, grad, b, head, mine, read, SHARED, False, BLOCK_C, PRECISION)
                total += p * (dp - delta[:, None])
    total = tl.reshape(total, (SIDE, SIDE, SIDE, SIDE))
    sums = tl.sum(tl.sum(total, axis=3), axis=1) if ROWS else tl.sum(tl.sum(total, axis=2), axis=0)
    entries = result + tl.cast(head, tl.int64) * out * size + own[:, None] * size + partners[None, :]
    tl.store(entries, sums, mask=(own >= 0)[:, None] & (partners >= 0)[None, :])


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
    grad, (grad_q, grad_k, grad_v, *grad_biases) = map_of(grad_out), results
    numbers = 3 if any(wanted.numel() for wanted in (grad_q, grad_k, *grad_biases)) else 2
    statistics = [q.new_empty((call.batch, heads, *call.out), dtype=torch.float32) for _ in range(numbers)]
    statistics = Statistics(*statistics, *[None] * (3 - numbers))
    tile = gradient_tile(call.attention.heads, mean, q.dtype, launch.architecture(q.device))
    options = {
        "WHOLE_D": call.attention.heads.dim <= tile.head_dim,
        "BLOCK_D": tile.head_dim,
        "BLOCK_C": tile.channels,
        "PRECISION": launch.dot_precision(tile.in_parts),
        "num_warps": tile.warps,
        "num_stages": 1,
        "maxnreg": 255,
    }
    with launch.on_device_of(q):
        arguments = (call.attention, grad, grad_lse, statistics, _wanted(grad_q), call.tiles, *call.counts)
        # In parts and with a bias, the scores of all heads in one program spilled when compiled for sm_90.
        biased = bias_y is not None and q.dtype == torch.float32 and tile.in_parts
        if mean and call.one_step and not biased:
            _window_grad_q_of_heads[(call.programs,)](*arguments, **options)
        else:
            _window_grad_q[(call.programs * heads,)](*arguments, SHARED=mean, RESULT_D=tile.result_d, **options)
        if grad_k.numel() or grad_v.numel():
            of_keys = options | {"num_warps": tile.key_warps}
            _key_gradients(call, grad, statistics, mean, tile, grad_k, grad_v, of_keys)
        for axis, result in enumerate(grad_biases):
            if result.numel():
                _bias_gradient(call, grad, statistics, mean, axis, result, options)


def _wanted(result: Tensor) -> Map | None:
    return map_of(result) if result.numel() else None


def _key_gradients(
    call: Call,
    grad: Map,
    statistics: Statistics,
    mean: bool,
    tile: GradientTile,
    grad_k: Tensor,
    grad_v: Tensor,
    options: dict,
) -> None:
    rows, columns = call.axes(of_keys=True)
    heads, tiles = call.attention.heads, tiles_of(rows, columns, call.device)
    counts, programs = (len(rows), len(columns)), call.batch * len(rows) * len(columns)
    steps = rows.most_steps * columns.most_steps
    both = grad_k.numel() and grad_v.numel()
    together = not mean and both and heads.dim <= tile.result_d and heads.width <= tile.result_c
    if grad_k.numel():
        launched = programs * heads.count * launch.cdiv(heads.dim, tile.result_d)
        shares = shares_of(launched, steps, max(grad_k.numel(), grad_v.numel() if together else 0), grad.data)
        keys, values = _parts(grad_k, shares), _parts(grad_v, shares) if together else None
        _window_grad_k[(launched * shares,)](
            call.attention, grad, statistics, map_of(keys), map_of(values) if together else None, tiles, *counts,
            call.batch, shares, SHARED=mean, RESULT_D=tile.result_d, RESULT_C=tile.result_c, **options
        )  # fmt: skip
        _join(keys, grad_k)
        if together:
            _join(values, grad_v)
    if grad_v.numel() and not together:
        launched = programs * (1 if mean else heads.count) * launch.cdiv(heads.width, tile.result_c)
        shares = shares_of(launched, steps, grad_v.numel(), grad.data)
        values = _parts(grad_v, shares)
        _window_grad_v[(launched * shares,)](
            call.attention, grad, statistics, map_of(values), tiles, *counts, call.batch, shares, SHARED=mean,
            RESULT_C=tile.result_c, **{name: value for name, value in options.items() if name != "BLOCK_C"}
        )  # fmt: skip
        _join(values, grad_v)


def shares_of(programs: int, steps: int, numel: int, largest: Tensor) -> int:
    """How many programs divide the readers of a tile of keys: enough for four on each of a large GPU's multiprocessors,
    each with four steps or more, and no more than keep their sums within the largest tensor. A function of shapes, and
    with it the order of every sum.
    """
    room = largest.numel() * largest.element_size() // (4 * numel)
    return max(1, min(-(-528 // programs), steps // 4, room))


def _parts(result: Tensor, shares: int) -> Tensor:
    """Room for the sums of each share, one after the other along the batch; for one, the result itself."""
    if shares == 1:
        return result
    batch, channels, *grid = result.shape
    return result.new_empty((shares * batch, *grid, channels), dtype=torch.float32).permute(0, 3, 1, 2)


def _join(parts: Tensor, result: Tensor) -> None:
    if parts is not result:
        result.copy_(parts.unflatten(0, (-1, len(result))).sum(0))


def _bias_gradient(
    call: Call, grad: Map, statistics: Statistics, mean: bool, axis: int, result: Tensor, options: dict
) -> None:
    axes = call.axes()
    # Keys that no query reads have a gradient, too.
    total = torch.zeros_like(result, dtype=torch.float32, memory_format=torch.contiguous_format)
    own_steps = axes[axis].most_steps
    _window_grad_bias[(len(axes[axis]) * own_steps * call.attention.heads.count,)](
        call.attention, grad, statistics, total, call.tiles, own_steps, len(axes[1 - axis]), call.batch,
        ROWS=axis == 0, SHARED=mean, **options
    )  # fmt: skip
    result.copy_(total)
