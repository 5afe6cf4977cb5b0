"""Resize, normalize and cut images into patch rows, one program per patch and block of its values."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels.launch import map_of, on_device_of
from murf_fast.kernels.resample import table_of
from murf_fast.tables.resize import AxisTable

__all__ = ["image_to_patches"]

# A patch of 14 has 588 values: one block of 1024 would idle 43 % of its lanes, three of 256 idle 23 %. Unmeasured.
BLOCK = 256


@triton.jit
def _image_to_patches(image, out, out_stride_b, out_stride_row, y_table, x_table, patch, grid_w, patches, gain, offset,
                      CHANNELS_FIRST: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b = row // patches
    n = row % patches
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = e < 3 * patch * patch
    if CHANNELS_FIRST:
        c = e // (patch * patch)
        yy = e // patch % patch
        xx = e % patch
    else:
        c = e % 3
        yy = e // (3 * patch)
        xx = e // 3 % patch
    y = (n // grid_w) * patch + yy
    x = (n % grid_w) * patch + xx
    from_y = tl.load(y_table.first + y, mask=inside, other=0).to(tl.int64)
    from_x = tl.load(x_table.first + x, mask=inside, other=0).to(tl.int64)
    rows = tl.load(y_table.count + y, mask=inside, other=0)
    columns = tl.load(x_table.count + x, mask=inside, other=0)
    base = image.data + b * image.stride_b + c.to(tl.int64) * image.stride_c
    base += from_y * image.stride_y + from_x * image.stride_x
    total = tl.zeros([BLOCK], dtype=tl.float32)
    ty = 0
    while ty < y_table.taps:
        line = tl.zeros([BLOCK], dtype=tl.float32)
        tx = 0
        while tx < x_table.taps:
            used = inside & (ty < rows) & (tx < columns)
            w = tl.load(x_table.weights + x * x_table.taps + tx, mask=used, other=0.0)
            value = tl.load(base + ty * image.stride_y + tx * image.stride_x, mask=used, other=0).to(tl.float32)
            line += w * value
            tx += 1
        total += tl.load(y_table.weights + y * y_table.taps + ty, mask=inside & (ty < rows), other=0.0) * line
        ty += 1
    # Scalars arrive as float32 from Python but as float64 from a compiled graph.
    factor = tl.where(c == 0, gain[0], tl.where(c == 1, gain[1], gain[2])).to(tl.float32)
    shift = tl.where(c == 0, offset[0], tl.where(c == 1, offset[1], offset[2])).to(tl.float32)
    result = total * factor + shift
    tl.store(out + b * out_stride_b + n * out_stride_row + e, result.to(out.dtype.element_ty), mask=inside)


def image_to_patches(
    image: Tensor,
    axes: tuple[AxisTable, AxisTable],
    patch_size: int,
    gain: tuple[float, float, float],
    offset: tuple[float, float, float],
    channels_first: bool,
    out: Tensor,
) -> None:
    axis_y, axis_x = axes
    grid_w = axis_x.out_size // patch_size
    patches = axis_y.out_size // patch_size * grid_w
    grid = (image.shape[0] * patches, triton.cdiv(3 * patch_size * patch_size, BLOCK))
    with on_device_of(image):
        _image_to_patches[grid](
            map_of(image),
            out,
            out.stride(0),
            out.stride(1),
            table_of(axis_y, image.device),
            table_of(axis_x, image.device),
            patch_size,
            grid_w,
            patches,
            tuple(gain),
            tuple(offset),
            CHANNELS_FIRST=channels_first,
            BLOCK=BLOCK,
        )
