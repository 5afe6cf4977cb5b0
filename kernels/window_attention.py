"""Window attention on tiles of queries that share keys; no scores in memory.

Two passes over the keys of a tile (:mod:`murf_fast.kernels.window_weights`). The first, by head, finds every query's
largest score and sum of exponentials. The second, by block of channels, forms the scores again, now turns them into
weights at once, and multiplies the values by them. One pass with a running softmax would not do: its accumulators would
hold every channel of a query, and values have up to 1536; and where every head weighs all channels (AnyUp) the heads'
weights are averaged first, so that there is one product with the values and not one per head.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.kernels.launch import map_of
from murf_fast.kernels.window_weights import (
    Call,
    Softmax,
    cells_of,
    count_of,
    load_cells,
    mean_weights,
    scores_of,
    statistic_at,
    store_cells,
    tile_of,
)

__all__ = ["window_attention"]


@triton.jit
def _window_softmax(attention, softmax, lse, queries, keys, y_tiles, x_tiles, QUERIES: tl.constexpr, KEYS: tl.constexpr,
                    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """First pass: one tile of queries, one head, KEYS keys at a time; the softmax's numbers, and ``lse`` if wanted."""
    head = tl.program_id(0) % attention.heads.count
    b, i, j = tile_of(tl.program_id(0) // attention.heads.count, y_tiles, x_tiles)
    mine = cells_of(queries, i, j, 0, QUERIES)
    largest = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    count = count_of(keys, i, j)
    start = 0
    while start < count:
        s = scores_of(attention, b, head, mine, cells_of(keys, i, j, start, KEYS), QUERIES, KEYS, BLOCK_D, PRECISION)
        peak = tl.maximum(largest, tl.max(s, axis=1))
        # A chunk of -inf alone must not turn into NaN before a later chunk has a finite score.
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(s - shift[:, None]), axis=1)
        largest = peak
        start += KEYS
    at = statistic_at(attention, b, head, mine)
    tl.store(softmax.largest + at, largest, mask=mine.inside)
    tl.store(softmax.total + at, total, mask=mine.inside)
    if lse is not None:
        tl.store(lse + at, largest + tl.log(total), mask=mine.inside)


@triton.jit
def _window_attention(attention, out, softmax, queries, keys, y_tiles, x_tiles, QUERIES: tl.constexpr,
                      KEYS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
                      PRECISION: tl.constexpr):  # fmt: skip
    """Second pass: one tile of queries, BLOCK_C channels of one group, KEYS keys at a time."""
    width = attention.heads.channels // attention.heads.groups
    c_tiles = tl.cdiv(width, BLOCK_C)
    c_tile, rest = tl.program_id(0) % c_tiles, tl.program_id(0) // c_tiles
    group = rest % attention.heads.groups
    b, i, j = tile_of(rest // attention.heads.groups, y_tiles, x_tiles)
    first, end = group * width + c_tile * BLOCK_C, group * width + width
    mine = cells_of(queries, i, j, 0, QUERIES)
    total = tl.zeros((QUERIES, BLOCK_C), dtype=tl.float32)
    count = count_of(keys, i, j)
    start = 0
    while start < count:
        read = cells_of(keys, i, j, start, KEYS)
        weights = mean_weights(attention, softmax, b, group, mine, read, QUERIES, KEYS, BLOCK_D, PRECISION)
        values = load_cells(attention.v, b, read, first, end, BLOCK_C)
        total = tl.dot(weights.to(values.dtype), values, total, input_precision=PRECISION)
        start += KEYS
    store_cells(out, b, mine, first, end, total, BLOCK_C)


def softmax_of(call: Call, lse: Tensor | None = None) -> Softmax:
    """Runs the first pass."""
    softmax = Softmax(call.statistic(), call.statistic())
    _window_softmax[(call.query_tiles * call.attention.heads.count,)](
        call.attention, softmax, lse, call.queries, call.keys, *call.tiles, **call.options()
    )
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
    """``out`` (B, C, H, W) of any strides, and ``lse`` (B, heads, H, W) float32; see the op."""
    call = Call(q, k, v, bias_y, bias_x, rule, heads, mean, scale)
    with launch.on_device_of(out):
        softmax = softmax_of(call, lse)
        _window_attention[(call.query_tiles * call.attention.heads.groups * call.c_tiles,)](
            call.attention, map_of(out), softmax, call.queries, call.keys, *call.tiles, BLOCK_C=call.tile.channels,
            **call.options(),
        )  # fmt: skip
