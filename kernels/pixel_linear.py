"""One layer of a pointwise network over rows of pixels: see :mod:`murf_fast.ops._pixel_linear`.

A program makes all channels of a tile of pixels, as two halves: the position mixing pairs a channel of the first half
of a head with one of the second. It reads all that it needs of its pixels before it writes, so the result may replace
the input or the residual.
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
from murf_fast.kernels.products import product
from murf_fast.tables.moments import join

__all__ = ["pixel_linear"]


class Rows(NamedTuple):
    """Pixels by inputs, of any strides."""

    data: Tensor
    stride_pixel: int
    stride_input: int


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


@triton.jit
def _inputs(x, gain, offset, p, p_inside, i, i_inside):
    """Inputs i of pixels p, float32, normalized and activated if there is a ``gain``; 0 outside."""
    inside = p_inside[:, None] & i_inside[None, :]
    pointers = x.data + p.to(tl.int64)[:, None] * x.stride_pixel + i.to(tl.int64)[None, :] * x.stride_input
    v = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    if gain is not None:
        v = v * tl.load(gain + i, mask=i_inside, other=0.0)[None, :]
        v = v + tl.load(offset + i, mask=i_inside, other=0.0)[None, :]
        v = tl.where(inside, v / (1.0 + tl.exp(-v)), 0.0)
    return v


@triton.jit
def _angles(rotate_rows, rotate_columns, p, inside, c, channels, width):
    """Cosine and sine of the angles of pixels p and channels c, by the addition theorem."""
    row = rotate_rows + (p // width)[:, None] * 2 * channels + c[None, :]
    column = rotate_columns + (p % width)[:, None] * 2 * channels + c[None, :]
    row_cosine, row_sine = tl.load(row, mask=inside, other=0.0), tl.load(row + channels, mask=inside, other=0.0)
    cosine, sine = tl.load(column, mask=inside, other=0.0), tl.load(column + channels, mask=inside, other=0.0)
    return row_cosine * cosine - row_sine * sine, row_sine * cosine + row_cosine * sine


@triton.jit
def _finished(y, bias, residual, p, inside, c, c_inside, channels):
    if bias is not None:
        y += tl.load(bias + c, mask=c_inside, other=0.0)[None, :]
    if residual is not None:
        at = p.to(tl.int64)[:, None] * channels + c[None, :]
        y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def _written(y, out, out_stride, statistics, p, inside, c, c_inside, channels, count):
    at = p.to(tl.int64)[:, None] * out_stride + c[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)
    if statistics is not None:
        mean = tl.sum(tl.where(inside, y, 0.0), axis=0) / count
        difference = tl.where(inside, y - mean[None, :], 0.0)
        to = statistics + tl.program_id(0).to(tl.int64) * 2 * channels + c
        tl.store(to, mean, mask=c_inside)
        tl.store(to + channels, tl.sum(difference * difference, axis=0), mask=c_inside)


@kernel
def _pixel_linear(x, gain, offset, weight, bias, residual, rotate_rows, rotate_columns, out, out_stride, statistics,
                  pixels, inputs, channels, width, unit_eps, UNIT: tl.constexpr, HEADS: tl.constexpr,
                  PIXELS: tl.constexpr, DEPTH: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    # Of every head the first half of the channels, and with `half` more the second.
    c = tl.arange(0, HALF)
    half = channels // 2 // HEADS
    p_inside, c_inside = p < pixels, c < channels // 2
    if HEADS > 1:  # one head's are a run of memory, which the compiler has to see
        c = c // half * 2 * half + c % half
    inside = p_inside[:, None] & c_inside[None, :]
    if weight is None:
        first = _inputs(x, gain, offset, p, p_inside, c, c_inside)
        second = _inputs(x, gain, offset, p, p_inside, c + half, c_inside)
    else:
        first = tl.zeros((PIXELS, HALF), dtype=tl.float32)
        second = tl.zeros((PIXELS, HALF), dtype=tl.float32)
        squares = tl.zeros((PIXELS,), dtype=tl.float32)
        begin = 0
        while begin < inputs:
            i = begin + tl.arange(0, DEPTH)
            v = _inputs(x, gain, offset, p, p_inside, i, i < inputs)
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
    first = _finished(first, bias, residual, p, inside, c, c_inside, channels)
    second = _finished(second, bias, residual, p, inside, c + half, c_inside, channels)
    if rotate_rows is not None:
        cosine, sine = _angles(rotate_rows, rotate_columns, p, inside, c, channels, width)
        turned = first * cosine - second * sine
        cosine, sine = _angles(rotate_rows, rotate_columns, p, inside, c + half, channels, width)
        second = second * cosine + first * sine
        first = turned
    count = tl.minimum(pixels - tl.program_id(0) * PIXELS, PIXELS).to(tl.float32)
    _written(first, out, out_stride, statistics, p, inside, c, c_inside, channels, count)
    _written(second, out, out_stride, statistics, p, inside, c + half, c_inside, channels, count)


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
    tile = pixel_tile(out.dtype, x.shape[1], rotation is not None)
    programs = launch.cdiv(pixels, tile.pixels)
    parts = out.new_empty((programs, 2, channels), dtype=torch.float32) if statistics else None
    gain, offset = norm or (None, None)
    rows, columns = rotation or (None, None)
    with launch.on_device_of(out):
        _pixel_linear[(programs,)](
            Rows(x, *x.stride()),
            gain,
            offset,
            weight,
            bias,
            residual,
            rows,
            columns,
            out,
            out.stride(0),
            parts,
            pixels,
            x.shape[1],
            channels,
            1 if columns is None else len(columns),
            unit_eps or 0.0,
            UNIT=unit_eps is not None,
            HEADS=heads,
            PIXELS=tile.pixels,
            DEPTH=tile.depth,
            HALF=max(16, launch.power_of_two(channels // 2)),
            PRECISION=launch.dot_precision(),
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )
    return None if parts is None else join(parts, tile.pixels, pixels)
