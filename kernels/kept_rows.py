"""Rows of maps, resized along x, that stay in registers while the rows of the result that read them are made.

Neighbouring rows of a result read the same rows of a map: fourteen of them two, when 37 rows become 518. A program that
goes down the result resizes each row of a map along x once and adds multiples of what it holds; what is left per value
is a product for each tap along y, and the store.
"""

# ruff: noqa: RUF005  Triton joins tuples, but takes none apart with a star
from __future__ import annotations

import triton
import triton.language as tl

from murf_fast.kernels.resample import x_taps

# Taps along y that are kept: bicubic has four, five if antialiased. Everything longer is walked anew for every row.
MOST_KEPT = 5


@triton.jit
def nothing_kept(maps, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr, TAPS_Y: tl.constexpr):
    """TAPS_Y rows of every map, and the number of the row that comes after them."""
    rows = ()
    following = ()
    for _ in tl.static_range(len(maps)):
        following = following + (tl.program_id(0) * 0,)
        for _ in tl.static_range(TAPS_Y):
            rows = rows + (tl.zeros((BLOCK_X, BLOCK_C), dtype=tl.float32),)
    return rows, following


@triton.jit
def sum_of_kept(total, maps, heights, rows, following, b, y, x, c, x_inside, c_inside,
                BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
                TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr):  # fmt: skip
    """``total[i, j] + sum_s (U_s F_s)[b, c_j, y, x_i]``, and what is kept for the rows after y.

    ``rows`` and ``following``: what :func:`nothing_kept`, or the call for an earlier row, gave.
    """
    for m in tl.static_range(len(maps)):
        first = tl.load(maps[m].y.first + y)
        count = tl.load(maps[m].y.count + y)
        image = maps[m].map.data + b.to(tl.int64) * maps[m].map.stride_b
        own = rows[:TAPS_Y]
        # Rows that nobody reads, of a map that is reduced, are left out.
        row = tl.maximum(following[0], first)
        while row < first + TAPS_Y:
            # A row that this one does not read may be one that the next one does.
            inside = x_inside & (tl.zeros_like(x) + row < heights[m])
            new = _resized_row(maps[m], image, row, x, c, inside, c_inside, BLOCK_X, BLOCK_C, TAPS_X)
            own = own[1:] + (new,)
            row += 1
        for t in tl.static_range(TAPS_Y):
            # No product with a weight of 0: an unused row adds nothing, not 0 * NaN.
            if t < count:
                total += tl.load(maps[m].y.weights + y * maps[m].y.taps + t) * own[t]
        # The maps take turns.
        rows = rows[TAPS_Y:] + own
        following = following[1:] + (row,)
    return total, rows, following


@triton.jit
def _resized_row(source, image, row, x, c, used, c_inside,
                 BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr, TAPS_X: tl.constexpr):  # fmt: skip
    first = tl.load(source.x.first + x, mask=used, other=0)
    count = tl.load(source.x.count + x, mask=used, other=0)
    data = image + row.to(tl.int64) * source.map.stride_y
    c_offset = c.to(tl.int64) * source.map.stride_c
    return x_taps(
        data, source.map.stride_x, source.x, first, count, x, used, c_offset, c_inside, BLOCK_X, BLOCK_C, TAPS_X
    )
