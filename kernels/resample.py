"""Device functions that walk the two axis tables of a map.

A map is a tuple (data, stride_b, stride_c, stride_y, stride_x, y_first, y_count, y_weights, y_taps, x_first, x_count,
x_weights, x_taps); strides are in elements, tables as in
:class:`murf_fast.tables.resize.AxisTable`. Offsets into maps are int64. TAPS_Y and TAPS_X are tap counts to unroll, or
0 for loops.

Loops of run-time length are ``while`` loops in all kernels: Triton's interpreter cannot take the length of a ``range``
from a kernel argument under NumPy 2.4 and later.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _x_tap(row, source, t, x, first, count, weights, taps, x_inside, c_offset, c_inside, stride_x):
    # Weights beyond the count are padding, whose cell may lie outside the map: neither is read.
    used = x_inside & (t < count)
    weight = tl.load(weights + x * taps + t, mask=used, other=0.0)
    pointers = source + ((first + t).to(tl.int64) * stride_x)[:, None] + c_offset[None, :]
    value = tl.load(pointers, mask=used[:, None] & c_inside[None, :], other=0.0).to(tl.float32)
    # An unused tap adds nothing, not 0 * NaN, and used ones propagate NaN.
    return row + weight[:, None] * value


@triton.jit
def _y_tap(total, t, y, y_first, y_count, y_weights, y_taps, data, stride_y, stride_x,
           x, first, count, weights, taps, x_inside, c_offset, c_inside, TAPS_X: tl.constexpr):  # fmt: skip
    # A vector of the scalar condition: the interpreter of Triton 3.9 makes integers of a vector and a scalar bit.
    used = x_inside & (tl.zeros_like(x) + t < y_count)
    weight = tl.load(y_weights + y * y_taps + t, mask=t < y_count, other=0.0)
    source = data + (y_first + t).to(tl.int64) * stride_y
    row = tl.zeros_like(total)
    if TAPS_X > 0:
        for s in tl.static_range(TAPS_X):
            row = _x_tap(row, source, s, x, first, count, weights, taps, used, c_offset, c_inside, stride_x)
    else:
        s = 0
        while s < taps:
            row = _x_tap(row, source, s, x, first, count, weights, taps, used, c_offset, c_inside, stride_x)
            s += 1
    return total + weight * row


@triton.jit
def add_map(total, map, b, y, x, c, x_inside, c_inside, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr):
    """``total[i, j] + (U F)[b, c_j, y, x_i]`` in float32, for a scalar y and vectors x, c."""
    y_first = tl.load(map[5] + y)
    y_count = tl.load(map[6] + y)
    first = tl.load(map[9] + x, mask=x_inside, other=0)
    count = tl.load(map[10] + x, mask=x_inside, other=0)
    data = map[0] + b.to(tl.int64) * map[1]
    c_offset = c.to(tl.int64) * map[2]
    if TAPS_Y > 0:
        for t in tl.static_range(TAPS_Y):
            total = _y_tap(total, t, y, y_first, y_count, map[7], map[8], data, map[3], map[4],
                           x, first, count, map[11], map[12], x_inside, c_offset, c_inside, TAPS_X)  # fmt: skip
    else:
        t = 0
        while t < map[8]:
            total = _y_tap(total, t, y, y_first, y_count, map[7], map[8], data, map[3], map[4],
                           x, first, count, map[11], map[12], x_inside, c_offset, c_inside, TAPS_X)  # fmt: skip
            t += 1
    return total


@triton.jit
def resampled_sum(maps, bias, bias_stride, b, y, x, c, x_inside, c_inside,
                  BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
                  TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr):  # fmt: skip
    """``sum_s (U_s F_s)[b, c_j, y, x_i] + bias[b, c_j]`` as a (BLOCK_X, BLOCK_C) float32 tile; 0 outside."""
    total = tl.zeros((BLOCK_X, BLOCK_C), dtype=tl.float32)
    for m in tl.static_range(len(maps)):
        total = add_map(total, maps[m], b, y, x, c, x_inside, c_inside, TAPS_Y, TAPS_X)
    if bias is not None:
        total += tl.load(bias + b.to(tl.int64) * bias_stride + c, mask=c_inside, other=0.0)[None, :]
    return total
