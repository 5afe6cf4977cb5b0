"""One layer of a pointwise network over rows of pixels: see :mod:`murf_fast.ops._pixel_linear`.

A program makes all channels of a tile of pixels, as two halves: the position mixing pairs a channel of the first half
of a head with one of the second. It reads all that it needs of its pixels before it writes, so the result may replace
the input or the residual. Large layers with products go to the programs of
:mod:`murf_fast.kernels.pixel_linear_resident` where they can.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.moments import join
from murf_fast.kernels.pixel_layers import Rows, finished, inputs_of, turned, written
from murf_fast.kernels.pixel_linear_resident import _pixel_linear_resident, resident_programs, resident_tile
from murf_fast.kernels.products import product

__all__ = ["pixel_linear"]


@dataclass(frozen=True)
class PixelTile:
    """One program makes all outputs of some pixels: pixels, inputs at a time, warps, registers a thread at most."""

    pixels: int
    depth: int
    warps: int
    registers: int


def pixel_tile(dtype: torch.dtype, inputs: int, rotates: bool) -> PixelTile:
    """Sums of 64 pixels x 128 channels are 32 registers of each of 256 threads. Angles need as many again, and spilled
    at 64 pixels. The parts of float32 products are as many again, too: half the pixels leave room for two programs on a
    multiprocessor. The few channels of an image are no product for tensor cores, which take sixteen.
    """
    if inputs <= 4:
        return PixelTile(32, 1, 8, 168)
    if dtype == torch.float32:
        return PixelTile(32, 32, 8, 168)
    return PixelTile(32 if rotates else 64, 32, 8, 255)


@kernel
def _pixel_linear(x, gain, offset, weight, bias, residual, rotate_rows, rotate_columns, out, out_stride, statistics,
                  pixels, inputs, channels, width, unit_eps, UNIT: tl.constexpr, HEADS: tl.constexpr,
                  PIXELS: tl.constexpr, DEPTH: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    p = tile * PIXELS + tl.arange(0, PIXELS)
    # Of every head the first half of the channels, and with `half` more the second.
    c = tl.arange(0, HALF)
    half = channels // 2 // HEADS
    p_inside, c_inside = p < pixels, c < channels // 2
    if HEADS > 1:  # one head's are a run of memory, which the compiler has to see
        c = c // half * 2 * half + c % half
    inside = p_inside[:, None] & c_inside[None, :]
    if weight is None:
        first = inputs_of(x, gain, offset, p, p_inside, c, c_inside)
        second = inputs_of(x, gain, offset, p, p_inside, c + half, c_inside)
    else:
        first = tl.zeros((PIXELS, HALF), dtype=tl.float32)
        second = tl.zeros((PIXELS, HALF), dtype=tl.float32)
        squares = tl.zeros((PIXELS,), dtype=tl.float32)
        begin = 0
        while begin < inputs:
            i = begin + tl.arange(0, DEPTH)
            v = inputs_of(x, gain, offset, p, p_inside, i, i < inputs)
            if UNIT:
                squares += tl.sum(v * v, axis=1)
            v = v.to(weight.dtype.element_ty)
            at = weight + i.to(tl.int64)[:, None] * channels + c[None, :]
            both = (i < inputs)[:, None] & c_inside[None, :]
            left, right = tl.load(at, mask=both, other=0.0), tl.load(at + half, mask=both, other=0.0)
            if DEPTH == 1:
                first += v.to(tl.float32) * left.to(tl.float32)
                second += v.to(tl.float32) * right.to(tl.float32)
            elif weight.dtype.element_ty == tl.float32:
                first = product(v, left, first, PRECISION)
                second = product(v, right, second, PRECISION)
            else:
                first = tl.dot(v, left, first)
                second = tl.dot(v, right, second)
            begin += DEPTH
        if UNIT:
            inverse = 1.0 / tl.sqrt(squares / inputs + unit_eps)
            first, second = first * inverse[:, None], second * inverse[:, None]
    first = finished(first, bias, residual, p, inside, c, c_inside, channels)
    second = finished(second, bias, residual, p, inside, c + half, c_inside, channels)
    if rotate_rows is not None:
        first, second = turned(first, second, rotate_rows, rotate_columns, p, inside, c, half, channels, width)
    count = tl.minimum(pixels - tile * PIXELS, PIXELS).to(tl.float32)
    written(first, out, out_stride, statistics, tile, p, inside, c, c_inside, channels, count)
    written(second, out, out_stride, statistics, tile, p, inside, c + half, c_inside, channels, count)


def pixel_linear(
    x: Tensor,
    out: Tensor,
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    unit_eps: float | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
    heads: int = 1,
    statistics: bool = False,
) -> tuple[Tensor, Tensor] | None:
    pixels, channels = out.shape
    tile = resident_tile(out.dtype, rotation is not None)
    programs = resident_programs(tile, x, out, weight)
    if programs is None:
        tile = pixel_tile(out.dtype, x.shape[1], rotation is not None)
    tiles = launch.cdiv(pixels, tile.pixels)
    moments = out.new_empty((tiles, 2, channels), dtype=torch.float32) if statistics else None
    gain, offset = norm or (None, None)
    rows, columns = rotation or (None, None)
    half = launch.power_of_two(channels // 2)
    arguments = (Rows(x, *x.stride()), gain, offset, weight, bias, residual, rows, columns, out, out.stride(0), moments,
                 pixels, x.shape[1], channels, 1 if columns is None else len(columns))  # fmt: skip
    options = {
        "UNIT": unit_eps is not None,
        "HEADS": heads,
        "PIXELS": tile.pixels,
        "DEPTH": tile.depth,
        "PRECISION": launch.dot_precision(),
        "num_warps": tile.warps,
        "maxnreg": tile.registers,
    }
    with launch.on_device_of(out):
        if programs is None:
            _pixel_linear[(tiles,)](*arguments, unit_eps or 0.0, HALF=max(16, half), **options)
        else:
            programs = min(programs, tiles)
            _pixel_linear_resident[(programs, tile.shares)](
                *arguments,
                tiles,
                programs,
                unit_eps or 0.0,
                INPUTS=max(tile.depth, launch.power_of_two(x.shape[1])),
                HALF=max(16, half // tile.shares),
                num_stages=2,
                **options,
            )
    return None if moments is None else join(moments, tile.pixels, pixels)
