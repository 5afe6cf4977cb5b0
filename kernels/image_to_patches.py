"""Resize, normalize and cut images into patch rows, one program per patch and block of its values."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels.launch import on_device_of
from murf_fast.tables.resize import AxisTable

__all__ = ["image_to_patches"]

# A patch of 14 has 588 values: one block of 1024 would idle 43 % of its lanes, three of 256 idle 23 %. Unmeasured.
BLOCK = 256


@triton.jit
def _image_to_patches(
    image,
    out,
    first_y,
    count_y,
    weights_y,
    first_x,
    count_x,
    weights_x,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    out_stride_b,
    out_stride_row,
    patch,
    grid_w,
    patches,
    taps_y,
    taps_x,
    gain_0,
    gain_1,
    gain_2,
    offset_0,
    offset_1,
    offset_2,
    CHANNELS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
    from_y = tl.load(first_y + y, mask=inside, other=0).to(tl.int64)
    from_x = tl.load(first_x + x, mask=inside, other=0).to(tl.int64)
    rows = tl.load(count_y + y, mask=inside, other=0)
    columns = tl.load(count_x + x, mask=inside, other=0)
    base = image + b * stride_b + c.to(tl.int64) * stride_c + from_y * stride_y + from_x * stride_x
    total = tl.zeros([BLOCK], dtype=tl.float32)
    ty = 0
    while ty < taps_y:
        line = tl.zeros([BLOCK], dtype=tl.float32)
        tx = 0
        while tx < taps_x:
            used = inside & (ty < rows) & (tx < columns)
            w = tl.load(weights_x + x * taps_x + tx, mask=used, other=0.0)
            value = tl.load(base + ty * stride_y + tx * stride_x, mask=used, other=0).to(tl.float32)
            line += w * value
            tx += 1
        total += tl.load(weights_y + y * taps_y + ty, mask=inside & (ty < rows), other=0.0) * line
        ty += 1
    # Scalars arrive as float32 from Python but as float64 from a compiled graph.
    gain = tl.where(c == 0, gain_0, tl.where(c == 1, gain_1, gain_2)).to(tl.float32)
    offset = tl.where(c == 0, offset_0, tl.where(c == 1, offset_1, offset_2)).to(tl.float32)
    result = total * gain + offset
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
            image,
            out,
            *axis_y.on(image.device),
            *axis_x.on(image.device),
            *image.stride(),
            out.stride(0),
            out.stride(1),
            patch_size,
            grid_w,
            patches,
            axis_y.taps,
            axis_x.taps,
            *gain,
            *offset,
            CHANNELS_FIRST=channels_first,
            BLOCK=BLOCK,
        )
