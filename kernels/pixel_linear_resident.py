"""One layer on many pixels by few programs, which keep their weights in shared memory and walk tiles of pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.pixel_layers import finished, inputs_of, turned, written
from murf_fast.kernels.products import product_of_parts, taken_apart

WIDEST = 128  # inputs and channels whose weights fit
LEAST_INPUTS = 16  # of a product on tensor cores
# Tiles of a program from which on it pays to have put its weights in order.
LEAST_TILES = 2


@dataclass(frozen=True)
class ResidentTile:
    """Pixels of a tile, programs that share its channels, inputs at a time, warps, registers a thread at most, and
    programs of a multiprocessor.
    """

    pixels: int
    shares: int
    depth: int
    warps: int
    registers: int
    resident: int


def resident_tile(dtype: torch.dtype, rotates: bool) -> ResidentTile:
    """64 pixels, what the four warps of a group multiply at once. The parts of 128 x 128 float32 weights are 128 KB,
    and a multiprocessor of sm_90 has 227: two programs with half of the channels each fit beside the next tile's
    pixels, and one multiplies while the other activates or writes. Weights in half precision are 32 KB, but with the
    angles of all channels a thread has too many values.

    Sums of 64 terms by themselves (kernels/products.py) lose on tensor cores what float32 does; sums of 32 lose half
    of that, and four of them took all registers of a thread.
    """
    if dtype == torch.float32 or rotates:
        return ResidentTile(64, 2, 64, 4, 255, 2)
    return ResidentTile(64, 1, 32, 4, 168, 3)


def resident_programs(tile: ResidentTile, x: Tensor, out: Tensor, weight: Tensor | None) -> int | None:
    """How many programs walk the tiles of a layer, times the shares of a tile; None for layers that are not for them:
    without products, or with more inputs than fit, with few pixels, or on another chip than sm_90: most have less
    shared memory or no products of warp groups, and compiled for sm_100 some layers spill.

    Programs that share a tile all read its pixels, so none may replace the input.
    """
    if weight is None or not LEAST_INPUTS <= x.shape[1] <= WIDEST or out.shape[1] > WIDEST:
        return None
    if launch.architecture(out.device) != 90:
        return None
    if tile.shares > 1 and x.untyped_storage()._cdata == out.untyped_storage()._cdata:
        return None
    programs = launch.multiprocessors(out.device) * tile.resident // tile.shares
    return programs if out.shape[0] >= LEAST_TILES * programs * tile.pixels else None


@triton.jit
def _channels(n, half, HEADS: tl.constexpr):
    """The channel of number n of the first halves of all heads, and with ``half`` more that of the second."""
    if HEADS > 1:
        return n // half * 2 * half + n % half
    return n


@kernel
def _pixel_linear_resident(x, gain, offset, weight, bias, residual, rotate_rows, rotate_columns, out, out_stride,
                          statistics, pixels, inputs, channels, width, tiles, programs, unit_eps, UNIT: tl.constexpr,
                          HEADS: tl.constexpr, PIXELS: tl.constexpr, INPUTS: tl.constexpr, DEPTH: tl.constexpr,
                          HALF: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    half = channels // 2 // HEADS
    first_c = tl.program_id(1) * HALF + tl.arange(0, HALF)
    c_inside = first_c < channels // 2
    c = _channels(first_c, half, HEADS)
    # Channels of one half beside those of the other: what a pair is made of is in one thread.
    both = tl.arange(0, 2 * HALF)
    number = tl.program_id(1) * HALF + both // 2
    column, column_inside = _channels(number, half, HEADS) + both % 2 * half, number < channels // 2
    weights = ()
    for begin in tl.static_range(0, INPUTS, DEPTH):
        i = begin + tl.arange(0, DEPTH)
        at = weight + i.to(tl.int64)[:, None] * channels + column[None, :]
        own = tl.load(at, mask=(i < inputs)[:, None] & column_inside[None, :], other=0.0)
        weights += (taken_apart(own, PRECISION) if own.dtype == tl.float32 else (own, own),)
    rest, step = launch.bound(tiles - tl.program_id(0)), launch.bound(programs)
    # Outside of the loop the addresses of all weights would take a third of the registers.
    for walked in tl.range(0, rest, step, disable_licm=True):
        tile = tl.program_id(0) + walked
        p = tile * PIXELS + tl.arange(0, PIXELS)
        p_inside = p < pixels
        inside = p_inside[:, None] & c_inside[None, :]
        y = tl.zeros((PIXELS, 2 * HALF), dtype=tl.float32)
        squares = tl.zeros((PIXELS,), dtype=tl.float32)
        for k in tl.static_range(INPUTS // DEPTH):
            i = k * DEPTH + tl.arange(0, DEPTH)
            v = inputs_of(x, gain, offset, p, p_inside, i, i < inputs)
            if UNIT:
                squares += tl.sum(v * v, axis=1)
            v = v.to(weight.dtype.element_ty)
            if weight.dtype.element_ty == tl.float32:
                y = product_of_parts(v, weights[k][0], weights[k][1], y, PRECISION)
            else:
                y = tl.dot(v, weights[k][0], y)
        if UNIT:
            y = y * (1.0 / tl.sqrt(squares / inputs + unit_eps))[:, None]
        first, second = tl.split(tl.reshape(y, (PIXELS, HALF, 2)))
        first = finished(first, bias, residual, p, inside, c, c_inside, channels)
        second = finished(second, bias, residual, p, inside, c + half, c_inside, channels)
        if rotate_rows is not None:
            first, second = turned(first, second, rotate_rows, rotate_columns, p, inside, c, half, channels, width)
        count = tl.minimum(pixels - tile * PIXELS, PIXELS).to(tl.float32)
        written(first, out, out_stride, statistics, tile, p, inside, c, c_inside, channels, count)
        written(second, out, out_stride, statistics, tile, p, inside, c + half, c_inside, channels, count)
