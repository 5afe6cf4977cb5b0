"""Walking the two axis tables of every map of a launch: the device functions, and what launches need for them.

Loops of run-time length are ``while`` loops in all kernels: Triton's interpreter cannot take the length of a ``range``
from a kernel argument under NumPy 2.4 and later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels.launch import Map, power_of_two
from murf_fast.tables.resize import AxisTable

Axes = Sequence[tuple[AxisTable, AxisTable]]  # of y and x, for every map

UNROLLED_ROWS = 2
UNROLLED_COLUMNS = 4
# Taps whose float32 sum keeps its digits, however large the rest of a sum is.
SHORT_SUM = tl.constexpr(64)
LONG = tl.constexpr(-1)


class Table(NamedTuple):
    """A :class:`murf_fast.tables.resize.AxisTable` on a device; ``weights`` (out_size, taps)."""

    first: Tensor
    count: Tensor
    weights: Tensor
    taps: int


class Resized(NamedTuple):
    """A map and the tables that take it to the grid of the result."""

    map: Map
    y: Table
    x: Table


@dataclass(frozen=True)
class Taps:
    """How the taps of an axis are walked, for all maps of a launch: that many unrolled, 0 for a loop, LONG for a loop
    over so many that they are summed in parts."""

    y: int
    x: int


@dataclass(frozen=True)
class Tile:
    """What one program works on: pixels of one row times channels, with its warps and registers a thread at most.

    Naming a bound on the registers stops ptxas from aiming lower by itself, which spilled on sm_80 and sm_90.
    """

    pixels: int
    channels: int
    warps: int
    registers: int


def reduce_tile(maps: int, channels: int, width: int) -> Tile:
    """Tiles of kernels that reduce the channels of a pixel: chunks of 16 classes, so that 150 of them are ten chunks
    and not three of 64, a pixel's sum stays within two or four threads, and neighbouring pixels find their cells in L1.
    Eight values a thread; four of several maps, whose addresses take the registers (three maps spilled).
    """
    block = min(power_of_two(channels), 16)
    return Tile(min(power_of_two(width), (1024 if maps == 1 else 512) // block), block, 4, 168)


def gather_tile(channels: int, width: int) -> Tile:
    """Tiles of gradients: every low-resolution cell gathers hundreds of pixels, so small tiles are what gives a map of
    56 x 56 cells more programs than a GPU has multiprocessors.
    """
    block = min(power_of_two(channels), 16)
    return Tile(min(power_of_two(width), 256 // block), block, 2, 255)


def taps_of(axes: Axes) -> Taps:
    """Bilinear cells (2 x 2) and bicubic runs (4) are unrolled. Sixteen bicubic cells at once spilled registers when
    compiled for sm_90; anything longer would only cost code and compilations.
    """
    return Taps(
        _walk(max(y.taps for y, _ in axes), UNROLLED_ROWS), _walk(max(x.taps for _, x in axes), UNROLLED_COLUMNS)
    )


def _walk(taps: int, unrolled: int) -> int:
    if taps <= unrolled:
        return taps
    return 0 if taps <= SHORT_SUM.value else LONG.value


def resized_maps(features: Sequence[Tensor], axes: Axes) -> tuple[Resized, ...]:
    """The maps as kernels take them."""
    return tuple(
        Resized(Map(f, *_strides(f)), table_of(y, f.device), table_of(x, f.device))
        for f, (y, x) in zip(features, axes, strict=True)
    )


def table_of(table: AxisTable, device: torch.device) -> Table:
    return Table(*table.on(device), table.taps)


def bias_stride(bias: Tensor | None) -> int:
    """Distance between the bias rows of two images; (1, C) serves every image."""
    return bias.shape[1] if bias is not None and bias.shape[0] > 1 else 0


def _strides(x: Tensor) -> tuple[int, ...]:
    # A stride along a dimension of one element is arbitrary; 0 keeps it from looking like the contiguous dimension.
    return tuple(s if n > 1 else 0 for n, s in zip(x.shape, x.stride(), strict=True))


@triton.jit
def _x_tap(row, source, stride_x, table, first, count, t, x, used, c_offset, c_inside):
    """``row`` and tap ``t`` of the pixels x where ``used``, from the map's row at ``source``."""
    # Weights beyond the count are padding, whose cell may lie outside the map: neither is read.
    used = used & (t < count)
    weight = tl.load(table.weights + x * table.taps + t, mask=used, other=0.0)
    pointers = source + ((first + t).to(tl.int64) * stride_x)[:, None] + c_offset[None, :]
    value = tl.load(pointers, mask=used[:, None] & c_inside[None, :], other=0.0).to(tl.float32)
    # An unused tap adds nothing, not 0 * NaN, and used ones propagate NaN.
    return row + weight[:, None] * value


@triton.jit
def x_taps(source, stride_x, table, first, count, x, used, c_offset, c_inside,
            BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr, TAPS_X: tl.constexpr):  # fmt: skip
    """One row of a map, resized along x: (BLOCK_X, BLOCK_C) float32."""
    row = tl.zeros((BLOCK_X, BLOCK_C), dtype=tl.float32)
    if TAPS_X > 0:
        for s in tl.static_range(TAPS_X):
            row = _x_tap(row, source, stride_x, table, first, count, s, x, used, c_offset, c_inside)
    elif TAPS_X == 0:
        s = 0
        while s < table.taps:
            row = _x_tap(row, source, stride_x, table, first, count, s, x, used, c_offset, c_inside)
            s += 1
    else:
        total = tl.zeros((BLOCK_X, BLOCK_C), dtype=tl.float64)
        s = 0
        while s < table.taps:
            row = _x_tap(row, source, stride_x, table, first, count, s, x, used, c_offset, c_inside)
            s += 1
            if (s % SHORT_SUM == 0) | (s == table.taps):
                total += row.to(tl.float64)
                row = tl.zeros((BLOCK_X, BLOCK_C), dtype=tl.float32)
        row = total.to(tl.float32)
    return row


@triton.jit
def _y_tap(total, source, image, y_first, y_count, t, y, first, count, x, x_inside, c_offset, c_inside,
           BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr, TAPS_X: tl.constexpr):  # fmt: skip
    """``total`` and row ``t`` of those that output row y reads."""
    # A vector of the scalar condition: the interpreter of Triton 3.9 makes integers of a vector and a scalar bit.
    used = x_inside & (tl.zeros_like(x) + t < y_count)
    weight = tl.load(source.y.weights + y * source.y.taps + t, mask=t < y_count, other=0.0)
    data = image + (y_first + t).to(tl.int64) * source.map.stride_y
    row = x_taps(
        data, source.map.stride_x, source.x, first, count, x, used, c_offset, c_inside, BLOCK_X, BLOCK_C, TAPS_X
    )
    return total + weight * row


@triton.jit
def _add_map(total, source, b, y, x, c, x_inside, c_inside,
             BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr):  # fmt: skip
    """``total[i, j] + (U F)[b, c_j, y, x_i]`` in float32, for a scalar y and vectors x, c."""
    y_first = tl.load(source.y.first + y)
    y_count = tl.load(source.y.count + y)
    first = tl.load(source.x.first + x, mask=x_inside, other=0)
    count = tl.load(source.x.count + x, mask=x_inside, other=0)
    image = source.map.data + b.to(tl.int64) * source.map.stride_b
    c_offset = c.to(tl.int64) * source.map.stride_c
    if TAPS_Y > 0:
        for t in tl.static_range(TAPS_Y):
            total = _y_tap(total, source, image, y_first, y_count, t, y, first, count, x, x_inside, c_offset, c_inside,
                           BLOCK_X, BLOCK_C, TAPS_X)  # fmt: skip
    elif TAPS_Y == 0:
        t = 0
        while t < source.y.taps:
            total = _y_tap(total, source, image, y_first, y_count, t, y, first, count, x, x_inside, c_offset, c_inside,
                           BLOCK_X, BLOCK_C, TAPS_X)  # fmt: skip
            t += 1
    else:
        joined = total.to(tl.float64)
        part = tl.zeros((BLOCK_X, BLOCK_C), dtype=tl.float32)
        t = 0
        while t < source.y.taps:
            part = _y_tap(part, source, image, y_first, y_count, t, y, first, count, x, x_inside, c_offset, c_inside,
                          BLOCK_X, BLOCK_C, TAPS_X)  # fmt: skip
            t += 1
            if (t % SHORT_SUM == 0) | (t == source.y.taps):
                joined += part.to(tl.float64)
                part = tl.zeros((BLOCK_X, BLOCK_C), dtype=tl.float32)
        total = joined.to(tl.float32)
    return total


@triton.jit
def resampled_sum(maps, readable, bias, bias_stride, b, y, x, c, x_inside, c_inside,
                  BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
                  TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr):  # fmt: skip
    """``sum_s (U_s F_s)[b, c_j, y, x_i] + bias[b, c_j]`` as a (BLOCK_X, BLOCK_C) float32 tile.

    The first ``readable`` channels of a map may be read, and those outside hold anything then. Offsets into maps are
    int64. TAPS_Y and TAPS_X as in :class:`Taps`.
    """
    total = tl.zeros((BLOCK_X, BLOCK_C), dtype=tl.float32)
    for m in tl.static_range(len(maps)):
        total = _add_map(total, maps[m], b, y, x, c, x_inside, c < readable, BLOCK_X, BLOCK_C, TAPS_Y, TAPS_X)
    if bias is not None:
        total += tl.load(bias + b.to(tl.int64) * bias_stride + c, mask=c_inside, other=0.0)[None, :]
    return total
