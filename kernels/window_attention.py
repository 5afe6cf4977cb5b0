"""Window attention on tiles of queries that share keys.

Where every head has its own values, a program is one head of a tile: one pass over the keys with a running softmax.
Where every head weighs all values (AnyUp), a program is a tile with all its heads, whose weights are averaged before
they meet the values, so that there is one product with the values and not one per head. The weights of a tile with no
more than 64 keys are made once and stay in registers for all channels; those of more go through memory
(:mod:`murf_fast.kernels.averaged_weights`).
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.averaged_weights import window_attention_of_many_keys
from murf_fast.kernels.launch import bound, map_of
from murf_fast.kernels.window_weights import (
    CELLS,
    Call,
    exponential_of,
    inverse_of,
    load_cells,
    members_of,
    partners_of,
    scores_of,
    shift_of,
    statistic_at,
    steps_of,
    store_cells,
    terms_of,
    tile_of,
)

__all__ = ["window_attention"]


@kernel
def _window_attention_split(attention, out, lse, tiles, y_tiles, x_tiles, WHOLE_D: tl.constexpr,
                            BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One head of a tile of queries, BLOCK_C of its channels."""
    heads = attention.heads
    c_tiles = tl.cdiv(heads.width, BLOCK_C)
    c_tile, rest = tl.program_id(0) % c_tiles, tl.program_id(0) // c_tiles
    head = rest % heads.count
    b, i, j = tile_of(rest // heads.count, y_tiles, x_tiles)
    first, end = head * heads.width + c_tile * BLOCK_C, (head + 1) * heads.width
    mine = members_of(tiles, i, j)
    largest = tl.full((CELLS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((CELLS,), dtype=tl.float32)
    result = tl.zeros((CELLS, BLOCK_C), dtype=tl.float32)
    for step in range(bound(steps_of(tiles, i, j))):
        read = partners_of(tiles, i, j, step)
        s = scores_of(attention, b, head, mine, read, None, False, WHOLE_D, BLOCK_D, PRECISION)
        peak = tl.maximum(largest, tl.max(s, axis=1))
        shift = shift_of(peak)
        weights = exponential_of(s - shift[:, None])
        before = exponential_of(largest - shift)
        total = total * before + tl.sum(weights, axis=1)
        values = load_cells(attention.v, b, read, first, end, BLOCK_C)
        result = tl.dot(weights.to(values.dtype), values, result * before[:, None], input_precision=PRECISION)
        largest = peak
    store_cells(out, b, mine, first, end, result * inverse_of(total)[:, None], BLOCK_C)
    if lse is not None:
        at = statistic_at(attention, b, head, mine)
        tl.store(lse + at, largest + tl.log(total), mask=mine.inside & (c_tile == 0))


@kernel
def _window_attention_mean(attention, out, lse, tiles, y_tiles, x_tiles, WHOLE_D: tl.constexpr,
                           BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tile of queries with at most 64 keys, all heads and channels."""
    heads = attention.heads
    b, i, j = tile_of(tl.program_id(0), y_tiles, x_tiles)
    mine = members_of(tiles, i, j)
    read = partners_of(tiles, i, j, 0)
    term = terms_of(attention, 0, mine, read, False) if attention.terms.bias_rows is None else None
    mean = tl.zeros((CELLS, CELLS), dtype=tl.float32)
    for head in range(bound(heads.count)):
        s = scores_of(attention, b, head, mine, read, term, False, WHOLE_D, BLOCK_D, PRECISION)
        largest = tl.max(s, axis=1)
        weights = exponential_of(s - shift_of(largest)[:, None])
        total = tl.sum(weights, axis=1)
        mean += weights * inverse_of(total * heads.count)[:, None]
        if lse is not None:
            tl.store(lse + statistic_at(attention, b, head, mine), largest + tl.log(total), mask=mine.inside)
    mean = mean.to(attention.v.data.dtype.element_ty)
    for c in range(0, bound(heads.width), BLOCK_C):
        values = load_cells(attention.v, b, read, c, heads.width, BLOCK_C)
        store_cells(out, b, mine, c, heads.width, tl.dot(mean, values, input_precision=PRECISION), BLOCK_C)


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
    """``out`` (B, C, H, W) of any strides, and ``lse`` (B, heads, H, W) float32; see the op."""
    call = Call(q, k, v, bias_y, bias_x, rule, heads, mean, scale)
    arguments = (call.attention, map_of(out), lse, call.tiles, *call.counts)
    with launch.on_device_of(out):
        if mean and call.one_step:
            _window_attention_mean[(call.programs,)](*arguments, **call.options())
        elif mean:
            window_attention_of_many_keys(call, out, lse)
        else:
            _window_attention_split[(call.programs * heads * call.c_tiles,)](*arguments, **call.options())
