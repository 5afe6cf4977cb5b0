"""From what a search leaves behind to the nearest rows: rows rounded for the product, the candidates of every query,
and their distances by direct differences in float64.

With n the greatest error of a bank row, e that of the query (both of rounding), and |q|^2 + |b|^2 at most s, a product
that gives d^2 for the squared distance of rounded rows proves

    sqrt(d^2 - a) - (e + n)  <=  distance  <=  sqrt(d^2 + a) + (e + n),    a = 4 (D + 8) 2^-22 s + D 2^-120.

Products of half dtypes are exact, and each sum of two of the D terms is wrong by less than 2^-22 of the largest sum so
far (tensor cores may truncate where IEEE rounds: 2^-23), which is below |q| |b| <= s / 2. In "tf32x3" a float32 factor
x is h + l, h rounded to the eleven bits of TF32 and |l| <= 2^-11 |x|; the tensor cores cut l to eleven bits, too, by
less than 2^-10 |l|. Of (h + l) (h' + l'), three parts are summed: l l' is lost, at most 2^-22 |x x'|, and the cuts of l
and l' change the other two by 2^-21 (1 + 2^-11) |x x'| each, together less than 6 * 2^-22 |x x'|. There are then fewer
than 3.1 D sums. The product enters twice, and adding the norms, themselves rounded, takes less than 2 * 2^-22 s:

    (3.1 D + 6) 2^-22 s + 2 * 2^-22 s  <=  4 (D + 8) 2^-22 s.

Terms below the least normal number may be lost whole: at most 6 of 2^-126 per column.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.nearest_search import GROUP_BITS, INFINITY, Found

ROUNDING = tl.constexpr(2.0**-22)
LOST = tl.constexpr(2.0**-120)
# Beyond every key and every row.
LAST = tl.constexpr(0x7FFFFFFFFFFFFFFF)


class Rows(NamedTuple):
    """Rows whose entries are contiguous."""

    data: Tensor
    stride: int


class Rounded(NamedTuple):
    """Rows prepared for the product, and what was lost. All but ``rows`` are float64."""

    rows: Tensor  # (R, width), filled up with zeros
    scales: Tensor  # (R,), those that make unit rows; empty unless cosine
    squares: Tensor  # (R,), squared norms of ``rows``
    errors: Tensor  # (R,), norms of what rounding changed
    norms: Tensor  # (R,), squared norms of the rows as they came


class Bounds(NamedTuple):
    """What the bounds of this module's docstring are made of; of the queries, and (n, largest |b|^2) of the bank."""

    errors: Tensor
    squares: Tensor
    limits: Tensor


class Candidates(NamedTuple):
    """Of every query, what may be among its nearest rows."""

    values: Tensor  # (Q, wanted) float32: squared distances of rounded rows, rising
    places: Tensor  # (Q, wanted) int64: rows of the bank
    counts: Tensor  # (Q,) int32: how many there are
    dropped: Tensor  # (Q,) float32: the least value that is not among them


@kernel
def _nearest_rounded(x, mean, out, out_stride, scales, squares, errors, norms, rows, dim, width, BLOCK_R: tl.constexpr,
                     BLOCK_D: tl.constexpr):  # fmt: skip
    """Rows minus the mean, those of cosine distances scaled to unit rows first."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < rows
    norm = tl.zeros([BLOCK_R], dtype=tl.float64)
    begin = 0
    while begin < dim:
        c = begin + tl.arange(0, BLOCK_D)
        both = inside[:, None] & (c < dim)[None, :]
        value = (
            tl.load(x.data + (r * x.stride)[:, None] + c[None, :], mask=both, other=0.0).to(tl.float32).to(tl.float64)
        )
        norm += tl.sum(value * value, axis=1)
        begin += BLOCK_D
    tl.store(norms + r, norm, mask=inside)
    square = tl.zeros([BLOCK_R], dtype=tl.float64)
    error = tl.zeros([BLOCK_R], dtype=tl.float64)
    if scales is not None:
        # Rows of zeros are refused by whoever looks at the norms.
        scale = 1.0 / tl.sqrt(tl.where(norm > 0, norm, 1.0))
        tl.store(scales + r, scale, mask=inside)
    begin = 0
    while begin < width:
        c = begin + tl.arange(0, BLOCK_D)
        both = inside[:, None] & (c < dim)[None, :]
        value = (
            tl.load(x.data + (r * x.stride)[:, None] + c[None, :], mask=both, other=0.0).to(tl.float32).to(tl.float64)
        )
        if scales is not None:
            value = tl.where(both, value * scale[:, None], 0.0)
        value -= tl.load(mean + c, mask=c < dim, other=0.0).to(tl.float64)[None, :]
        rounded = tl.where(both, value, 0.0).to(tl.float32).to(out.dtype.element_ty)
        at = out + (r * out_stride)[:, None] + c[None, :]
        tl.store(at, rounded, mask=inside[:, None] & (c < width)[None, :])
        kept = rounded.to(tl.float32).to(tl.float64)
        square += tl.sum(kept * kept, axis=1)
        lost = tl.where(both, value - kept, 0.0)
        error += tl.sum(lost * lost, axis=1)
        begin += BLOCK_D
    tl.store(squares + r, square, mask=inside)
    tl.store(errors + r, tl.sqrt(error), mask=inside)


def product_error(s: Tensor, dim: int) -> Tensor:
    """The bound a of this module's docstring."""
    return 4 * (dim + 8) * ROUNDING.value * s + dim * LOST.value


@triton.jit
def bounds_of(bounds, q, inside, dim):
    """Of a query: e + n, and a."""
    error = tl.load(bounds.errors + q, mask=inside, other=0.0) + tl.load(bounds.limits)
    square = tl.load(bounds.squares + q, mask=inside, other=0.0) + tl.load(bounds.limits + 1)
    return error, 4.0 * (dim + 8) * ROUNDING * square + dim * LOST


@triton.jit
def _value(key, GROUP_BITS: tl.constexpr):
    """The squared distance in a key; infinity, too, for what is none: a lane that has no more."""
    packed = (key >> 32).to(tl.int32)
    value = (packed & -(1 << GROUP_BITS)).to(tl.float32, bitcast=True)
    return tl.where(packed < INFINITY, value, float("inf"))


@kernel
def _nearest_candidates(best, rest, bounds, values, places, counts, dropped, queries, first, split_rows, splits, dim, k,
                        wanted, BLOCK_Q: tl.constexpr, LANES: tl.constexpr, BLOCK_S: tl.constexpr, FEW: tl.constexpr,
                        GROUP_BITS: tl.constexpr):  # fmt: skip
    """The smallest of a query's lanes in rising order, until they are further than the k-th can be.

    A key is a packed distance and where it was found, so that no two are equal. The lanes of all splits show their
    smallest key that has not been taken. Keys are taken in rising order: what a lane shows next is its smallest above
    the one just taken, which is found by looking at one key per split.
    """
    q = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = q < queries
    lanes = tl.arange(0, LANES)
    least = tl.full([BLOCK_Q, LANES], LAST, dtype=tl.int64)
    given_up = tl.full([BLOCK_Q], INFINITY, dtype=tl.int32)
    begin = 0
    while begin < splits:
        for i in tl.static_range(FEW):
            at = (begin + i) * LANES + lanes
            mask = inside[:, None] & (begin + i < splits)
            packed = tl.load(best + (q * splits * LANES)[:, None] + at[None, :], mask=mask, other=INFINITY)
            least = tl.minimum(least, (packed.to(tl.int64) << 32) + at[None, :])
        begin += FEW
    begin = 0
    while begin < splits:
        s = begin + tl.arange(0, BLOCK_S)
        mask = inside[:, None] & (s < splits)[None, :]
        packed = tl.load(rest + (q * splits)[:, None] + s[None, :], mask=mask, other=INFINITY)
        given_up = tl.minimum(given_up, tl.min(packed, axis=1))
        begin += BLOCK_S
    error, absolute = bounds_of(bounds, q, inside, dim)
    limit = tl.full([BLOCK_Q], float("inf"), dtype=tl.float64)
    count = tl.zeros([BLOCK_Q], dtype=tl.int32)
    key = tl.min(least, axis=1)
    value = _value(key, GROUP_BITS)
    taking = inside & (value < float("inf"))
    while tl.max(taking.to(tl.int32), axis=0) > 0:
        at = (key & 0xFFFFFFFF).to(tl.int32)
        split, lane = at // LANES, at % LANES
        group = (key >> 32).to(tl.int32) & ((1 << GROUP_BITS) - 1)
        place = first + split.to(tl.int64) * split_rows + group * LANES + lane
        tl.store(values + q * wanted + count, value, mask=taking)
        tl.store(places + q * wanted + count, place, mask=taking)
        count += taking.to(tl.int32)
        # The packed distance was cut by less than 2^-12 of it. 2^-19: the roundings of the bound itself.
        squared = tl.maximum(value, 0.0).to(tl.float64) * (1 + 2.0**-12) + absolute
        furthest = tl.sqrt(squared) + 2 * error
        limit = tl.where(taking & (count == k), furthest * furthest * (1 + 2.0**-19) + absolute, limit)
        following = tl.full([BLOCK_Q], LAST, dtype=tl.int64)
        begin = 0
        while begin < splits:
            s = begin + tl.arange(0, BLOCK_S)
            mask = taking[:, None] & (s < splits)[None, :]
            from_lane = best + (q * splits * LANES + lane)[:, None] + (s * LANES)[None, :]
            packed = tl.load(from_lane, mask=mask, other=INFINITY)
            keys = (packed.to(tl.int64) << 32) + (s * LANES)[None, :] + lane[:, None]
            following = tl.minimum(following, tl.min(tl.where(keys > key[:, None], keys, LAST), axis=1))
            begin += BLOCK_S
        shows = taking[:, None] & (lanes[None, :] == lane[:, None])
        least = tl.where(shows, following[:, None], least)
        key = tl.min(least, axis=1)
        value = _value(key, GROUP_BITS)
        taking = taking & (count < wanted) & (value < float("inf")) & (value.to(tl.float64) <= limit)
    given_up = _value(given_up.to(tl.int64) << 32, GROUP_BITS)
    tl.store(counts + q, count, mask=inside)
    tl.store(dropped + q, tl.minimum(given_up, value), mask=inside)


def width_of(dim: int) -> int:
    """Columns of rounded rows, filled up with zeros: aligned rows, and no mask in the product's inner loop. Masked
    columns at unaligned addresses spilled registers when compiled for sm_90."""
    return launch.cdiv(dim, 64) * 64


def rounded(x: Tensor, mean: Tensor, cosine: bool, dtype: torch.dtype) -> Rounded:
    """Centred rows in ``dtype``. One pass over the rows, or two that meet in the cache, and no float64 copy of them."""
    rows, dim = x.shape
    width = width_of(dim)
    out = torch.empty(rows, width, dtype=dtype, device=x.device)
    scales = torch.empty(rows if cosine else 0, dtype=torch.float64, device=x.device)
    squares, errors, norms = torch.empty(3, rows, dtype=torch.float64, device=x.device)
    if rows:
        with launch.on_device_of(x):
            _nearest_rounded[(launch.cdiv(rows, 4),)](
                Rows(x, x.stride(0)),
                mean,
                out,
                width,
                scales if cosine else None,
                squares,
                errors,
                norms,
                rows,
                dim,
                width,
                BLOCK_R=4,
                BLOCK_D=256,
            )
    return Rounded(out, scales, squares, errors, norms)


def candidates(found: Found, bounds: Bounds, first: int, dim: int, k: int, wanted: int) -> Candidates:
    """The nearest of the rows that a search has seen, of which the first is row ``first`` of the bank.

    A warp has a query to itself: the smallest of its 128 keys takes shuffles and no barrier. Four queries share a
    program and wait for the one with most candidates; the interpreter, whose time goes by programs, asks for that.
    """
    queries, splits, lanes = found.best.shape
    values = torch.empty(queries, wanted, dtype=torch.float32, device=found.best.device)
    places = torch.empty(queries, wanted, dtype=torch.int64, device=found.best.device)
    counts = torch.empty(queries, dtype=torch.int32, device=found.best.device)
    dropped = torch.empty(queries, dtype=torch.float32, device=found.best.device)
    with launch.on_device_of(values):
        _nearest_candidates[(launch.cdiv(queries, 4),)](
            found.best,
            found.rest,
            bounds,
            values,
            places,
            counts,
            dropped,
            queries,
            first,
            found.split_rows,
            splits,
            dim,
            k,
            wanted,
            BLOCK_Q=4,
            LANES=lanes,
            BLOCK_S=min(launch.power_of_two(splits), 256),
            FEW=4,
            GROUP_BITS=GROUP_BITS,
            num_warps=4,
        )
    return Candidates(values, places, counts, dropped)
