"""Resize, normalize and cut images into patch rows, one program per patch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.launch import cdiv, map_of, on_device_of
from murf_fast.kernels.resample import LONG, SHORT_SUM, table_of
from murf_fast.tables.resize import AxisTable

__all__ = ["image_to_patches"]

# One value a thread: a patch of 14 has 588 values, which idle 8 % of the lanes of five blocks. Threads have their work
# in flight in the blocks, all of which are unrolled; a program has at most eight.
BLOCK, BLOCKS = 128, 8
# A thread at most, for 32 warps on a multiprocessor. Without a bound ptxas aimed at 32 and spilled for sm_100.
REGISTERS = 64
# Bilinear and bicubic taps; longer filters would only cost code and compilations.
UNROLLED = 4


@triton.jit
def _tap(line, row, stride_x, table, count, x, t, used):
    """``line`` and tap t of every x where ``used``, of pixels that begin at ``row``."""
    # Weights beyond the count are padding, whose pixel may lie outside the image: neither is read.
    used = used & (t < count)
    weight = tl.load(table.weights + x * table.taps + t, mask=used, other=0.0)
    return line + weight * tl.load(row + t * stride_x, mask=used, other=0).to(tl.float32)


@triton.jit
def _line(row, stride_x, table, count, x, used, BLOCK: tl.constexpr, TAPS: tl.constexpr):
    """The taps of every x, summed in float32; in parts and float64 if there are many."""
    line = tl.zeros([BLOCK], dtype=tl.float32)
    if TAPS > 0:
        for t in tl.static_range(TAPS):
            line = _tap(line, row, stride_x, table, count, x, t, used)
    elif TAPS == 0:
        t = 0
        while t < table.taps:
            line = _tap(line, row, stride_x, table, count, x, t, used)
            t += 1
    else:
        total = tl.zeros([BLOCK], dtype=tl.float64)
        t = 0
        while t < table.taps:
            line = _tap(line, row, stride_x, table, count, x, t, used)
            t += 1
            if (t % SHORT_SUM == 0) | (t == table.taps):
                total += line.to(tl.float64)
                line = tl.zeros([BLOCK], dtype=tl.float32)
        line = total.to(tl.float32)
    return line


@triton.jit
def _add_line(total, image, stride_y, stride_x, y_table, x_table, rows, columns, y, x, t, inside,
              BLOCK: tl.constexpr, TAPS_X: tl.constexpr):  # fmt: skip
    """``total`` and row t of those that every y reads."""
    used = inside & (t < rows)
    weight = tl.load(y_table.weights + y * y_table.taps + t, mask=used, other=0.0)
    return total + weight * _line(image + t * stride_y, stride_x, x_table, columns, x, used, BLOCK, TAPS_X)


@kernel(do_not_specialize=["grid_w", "patches"])
def _image_to_patches(image, out, out_stride_b, out_stride_row, y_table, x_table, grid_w, patches, gain, offset,
                      PATCH: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
                      BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
                      TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    b, n = tl.program_id(0) // patches, tl.program_id(0) % patches
    pixels = image.data + b.to(tl.int64) * image.stride_b
    row = out + b.to(tl.int64) * out_stride_b + n.to(tl.int64) * out_stride_row
    for block in tl.static_range(BLOCKS):
        e = (tl.program_id(1) * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        inside = e < 3 * PATCH * PATCH
        if CHANNELS_FIRST:
            c, yy, xx = e // (PATCH * PATCH), e // PATCH % PATCH, e % PATCH
        else:
            c, yy, xx = e % 3, e // (3 * PATCH), e // 3 % PATCH
        y, x = n // grid_w * PATCH + yy, n % grid_w * PATCH + xx
        from_y, from_x = tl.load(y_table.first + y, mask=inside), tl.load(x_table.first + x, mask=inside)
        rows, columns = tl.load(y_table.count + y, mask=inside), tl.load(x_table.count + x, mask=inside)
        channel = c
        if WIDE:
            channel, from_y, from_x = channel.to(tl.int64), from_y.to(tl.int64), from_x.to(tl.int64)
        at = pixels + (channel * image.stride_c + from_y * image.stride_y + from_x * image.stride_x)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        if TAPS_Y > 0:
            for t in tl.static_range(TAPS_Y):
                total = _add_line(total, at, image.stride_y, image.stride_x, y_table, x_table, rows, columns, y, x, t,
                                  inside, BLOCK, TAPS_X)  # fmt: skip
        elif TAPS_Y == 0:
            t = 0
            while t < y_table.taps:
                total = _add_line(total, at, image.stride_y, image.stride_x, y_table, x_table, rows, columns, y, x, t,
                                  inside, BLOCK, TAPS_X)  # fmt: skip
                t += 1
        else:
            joined = tl.zeros([BLOCK], dtype=tl.float64)
            t = 0
            while t < y_table.taps:
                total = _add_line(total, at, image.stride_y, image.stride_x, y_table, x_table, rows, columns, y, x, t,
                                  inside, BLOCK, TAPS_X)  # fmt: skip
                t += 1
                if (t % SHORT_SUM == 0) | (t == y_table.taps):
                    joined += total.to(tl.float64)
                    total = tl.zeros([BLOCK], dtype=tl.float32)
            total = joined.to(tl.float32)
        # Scalars arrive as float32 from Python but as float64 from a compiled graph.
        factor = tl.where(c == 0, gain[0], tl.where(c == 1, gain[1], gain[2])).to(tl.float32)
        shift = tl.where(c == 0, offset[0], tl.where(c == 1, offset[1], offset[2])).to(tl.float32)
        value = total * factor + shift
        if COLUMNS > 3 * PATCH * PATCH:
            value = tl.where(inside, value, 0.0)
        tl.store(row + e, value.to(out.dtype.element_ty), mask=e < COLUMNS)


def image_to_patches(
    image: Tensor,
    axes: tuple[AxisTable, AxisTable],
    patch_size: int,
    gain: tuple[float, float, float],
    offset: tuple[float, float, float],
    channels_first: bool,
    out: Tensor,
) -> None:
    """``out``: (B, patches, 3 p p or more); what is more becomes zeros."""
    axis_y, axis_x = axes
    grid_w = axis_x.out_size // patch_size
    patches = axis_y.out_size // patch_size * grid_w
    blocks = cdiv(out.shape[2], BLOCK)
    programs = cdiv(blocks, BLOCKS)
    with on_device_of(image):
        _image_to_patches[(image.shape[0] * patches, programs)](
            map_of(image),
            out,
            out.stride(0),
            out.stride(1),
            table_of(axis_y, image.device),
            table_of(axis_x, image.device),
            grid_w,
            patches,
            tuple(gain),
            tuple(offset),
            PATCH=patch_size,
            COLUMNS=out.shape[2],
            CHANNELS_FIRST=channels_first,
            BLOCK=BLOCK,
            BLOCKS=cdiv(blocks, programs),
            TAPS_Y=_unrolled(axis_y.taps),
            TAPS_X=_unrolled(axis_x.taps),
            WIDE=_reach(image) >= 2**31,
            maxnreg=REGISTERS,
        )


def _unrolled(taps: int) -> int:
    """Taps that are unrolled, 0 for a loop, LONG for one whose sum is made of parts."""
    if taps <= UNROLLED:
        return taps
    return 0 if taps <= SHORT_SUM.value else LONG.value


def _reach(image: Tensor) -> int:
    """Elements between the first and the last of one image."""
    return sum((n - 1) * stride for n, stride in zip(image.shape[1:], image.stride()[1:], strict=True))
