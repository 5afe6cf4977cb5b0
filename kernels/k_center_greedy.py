"""Greedy k-center on a GPU, lazily: most steps look at a thousand rows instead of all of them.

Distances to the nearest center only fall as centers are added. So the rows that are farthest now, the *pool*, are all
that matters until the farthest of them falls behind the farthest row outside, whose distance is an upper bound of what
it will be. One program selects among them for as long as that takes, by the distances between all rows of the pool;
then all rows meet the new centers, in one pass, and there is another pool. Its order is that of the definition, by
distance and then by row, so that the first row of a pool is the next center, and every pool gives at least one.

Distances that decide are sums of differences in float64. A row meets a center in float32 first, which says of most that
they are no nearer than before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.launch import cdiv, on_device_of, power_of_two

__all__ = ["k_center_greedy"]

BLOCK_ROWS = 32
BLOCK_COLUMNS = 64
# For the sums of four centers four warps take 204 registers each, which leaves room for eight warps in all.
WARPS = 8
# ptxas would rather spill two of them than take more than 64 for narrow rows.
REGISTERS = 128
# Rows of a pool; 8 bytes per pair of them. 1024 took 17.9 for 16.2 ms of 1000 centers of 100k x 384 on an H200.
POOL = 512
# Rows of a pool that meet a block of them in one program.
SHARE = 16
# Beyond every row.
LAST = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def _squared(x, stride, r, inside, center, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """(BLOCK_ROWS,) float64, the same for the same two rows wherever they are asked for."""
    squares = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float64)
    for d in range(0, DIM, BLOCK_COLUMNS):
        c = d + tl.arange(0, BLOCK_COLUMNS)
        row = tl.load(x + (r * stride)[:, None] + c[None, :], mask=inside[:, None] & (c < DIM)[None, :], other=0.0)
        middle = tl.load(x + center * stride + c, mask=c < DIM, other=0.0)
        difference = row.to(tl.float64) - middle.to(tl.float64)[None, :]
        squares += difference * difference
    return tl.sum(squares, axis=1)


@triton.jit
def _met(known, limit, met, squares, x, stride, r, inside, center, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
         BLOCK_COLUMNS: tl.constexpr):  # fmt: skip
    """``known`` after another center, if ``met``. ``squares`` (BLOCK_ROWS, BLOCK_COLUMNS) are those of float32."""
    rough = tl.sum(squares, axis=1)
    # Infinite: beyond float32, which says nothing.
    may = inside & ((rough.to(tl.float64) <= limit) | (rough == float("inf")))
    if met & (tl.max(may.to(tl.int32), axis=0) > 0):
        known = tl.minimum(known, _squared(x, stride, r, inside, center, DIM, BLOCK_ROWS, BLOCK_COLUMNS))
    return known


@kernel(do_not_specialize=["begin", "end"])
def _k_center_meet(x, stride, nearest, centers, begin, end, rows, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                   BLOCK_COLUMNS: tl.constexpr):  # fmt: skip
    """Squared distances to the nearest center after those from ``begin`` to ``end``, four per reading of a row."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = r < rows
    known = tl.load(nearest + r, mask=inside, other=-1.0)
    first = begin
    while first < end:
        c0 = tl.load(centers + first)
        c1 = tl.load(centers + tl.minimum(first + 1, end - 1))
        c2 = tl.load(centers + tl.minimum(first + 2, end - 1))
        c3 = tl.load(centers + tl.minimum(first + 3, end - 1))
        s0 = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
        s1 = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
        s2 = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
        s3 = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
        for d in range(0, DIM, BLOCK_COLUMNS):
            c = d + tl.arange(0, BLOCK_COLUMNS)
            at = x + c
            column = c < DIM
            row = tl.load(x + (r * stride)[:, None] + c[None, :], mask=inside[:, None] & column[None, :], other=0.0)
            row = row.to(tl.float32)
            d0 = row - tl.load(at + c0 * stride, mask=column, other=0.0).to(tl.float32)[None, :]
            d1 = row - tl.load(at + c1 * stride, mask=column, other=0.0).to(tl.float32)[None, :]
            d2 = row - tl.load(at + c2 * stride, mask=column, other=0.0).to(tl.float32)[None, :]
            d3 = row - tl.load(at + c3 * stride, mask=column, other=0.0).to(tl.float32)[None, :]
            s0 += d0 * d0
            s1 += d1 * d1
            s2 += d2 * d2
            s3 += d3 * d3
        # A difference, its square and fewer than DIM + 5 sums, each wrong by at most 2^-24 of what is never negative;
        # and squares below the least normal number, which may be lost.
        limit = known * (1 + (DIM + 8) * 2.0**-23) + (DIM + 8) * 2.0**-125
        # Which were known before is enough: what has become smaller only makes fewer rows look.
        known = _met(known, limit, True, s0, x, stride, r, inside, c0, DIM, BLOCK_ROWS, BLOCK_COLUMNS)
        known = _met(known, limit, first + 1 < end, s1, x, stride, r, inside, c1, DIM, BLOCK_ROWS, BLOCK_COLUMNS)
        known = _met(known, limit, first + 2 < end, s2, x, stride, r, inside, c2, DIM, BLOCK_ROWS, BLOCK_COLUMNS)
        known = _met(known, limit, first + 3 < end, s3, x, stride, r, inside, c3, DIM, BLOCK_ROWS, BLOCK_COLUMNS)
        first += 4
    tl.store(nearest + r, known, mask=inside)


@kernel
def _k_center_pairs(x, stride, pool, pairs, count, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                    BLOCK_COLUMNS: tl.constexpr, SHARE: tl.constexpr):  # fmt: skip
    """Squared distances between all rows of a pool, each computed once and stored twice."""
    n = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = n < count
    r = tl.load(pool + n, mask=inside, other=0)
    other = tl.program_id(1) * SHARE
    end = tl.minimum(tl.minimum(other + SHARE, count), (tl.program_id(0) + 1) * BLOCK_ROWS)
    while other < end:
        center = tl.load(pool + other)
        squared = _squared(x, stride, r, inside, center, DIM, BLOCK_ROWS, BLOCK_COLUMNS)
        new = inside & (n >= other)
        tl.store(pairs + other * count + n, squared, mask=new)
        tl.store(pairs + n * count + other, squared, mask=new & (n != other))
        other += 1


@kernel(do_not_specialize=["first", "total"])
def _k_center_select(nearest, order, pairs, centers, step, first, total, rows, count, POOL: tl.constexpr):
    """Centers from the pool, the first ``count`` of all rows in ``order``, until a row outside may be farther."""
    slots = tl.arange(0, POOL)
    inside = slots < count
    known = tl.load(nearest + slots, mask=inside, other=-2.0)
    row = tl.load(order + slots, mask=inside, other=LAST)
    outside = tl.load(nearest + count, mask=count < rows, other=-1.0)
    outside_row = tl.load(order + count, mask=count < rows, other=LAST)
    done = first
    farthest = tl.max(known, axis=0)
    center = tl.min(tl.where(known == farthest, row, LAST), axis=0)
    while (done < total) & ((farthest > outside) | ((farthest == outside) & (center < outside_row))):
        tl.store(centers + done, center)
        done += 1
        slot = tl.max(tl.where(row == center, slots, 0), axis=0)
        squared = tl.load(pairs + slot * count + slots, mask=inside, other=-2.0)
        known = tl.minimum(known, squared)
        farthest = tl.max(known, axis=0)
        center = tl.min(tl.where(known == farthest, row, LAST), axis=0)
    tl.store(step, done)


def k_center_greedy(
    features: Tensor,
    centers: Tensor,
    given: int,
    nearest: Tensor,
    met: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Waits for the device once per pool: how many centers a pool gives is not known before. ``nearest`` (N,) float64
    is of the first ``met`` centers, in the end of all but those of the last pool.
    """
    rows, total, device = len(features), len(centers), features.device
    count = min(POOL, rows)
    pairs = torch.empty(count, count, dtype=torch.float64, device=device)
    step = torch.full((1,), total, dtype=torch.int64, device=device)
    done = given
    while done < total:
        _meet(features, nearest, centers, met, done)
        met = done
        # Stable: of equal distances the lower row first.
        farthest, order = nearest.sort(descending=True, stable=True)
        with on_device_of(features):
            _k_center_pairs[(cdiv(count, BLOCK_ROWS), cdiv(count, SHARE))](
                features,
                features.stride(0),
                order,
                pairs,
                count,
                DIM=features.shape[1],
                BLOCK_ROWS=BLOCK_ROWS,
                BLOCK_COLUMNS=BLOCK_COLUMNS,
                SHARE=SHARE,
                num_warps=WARPS,
            )
            _k_center_select[(1,)](
                farthest, order, pairs, centers, step, done, total, rows, count, POOL=power_of_two(count)
            )
        done = int(step)
        if progress is not None:
            progress(done, total)


def _meet(features: Tensor, nearest: Tensor, centers: Tensor, begin: int, end: int) -> None:
    with on_device_of(features):
        _k_center_meet[(cdiv(len(features), BLOCK_ROWS),)](
            features,
            features.stride(0),
            nearest,
            centers,
            begin,
            end,
            len(features),
            DIM=features.shape[1],
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            num_warps=WARPS,
            maxnreg=REGISTERS,
        )
