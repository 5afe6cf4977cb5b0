"""Maps resized to one grid and summed: every value of the result is written once, in float32 arithmetic."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch, resample
from murf_fast.kernels.resample import LONG, Axes, Taps, Tile, resampled_sum

__all__ = ["upsample_sum"]


def write_tile(maps: int, channels: int, width: int, channels_last: bool, taps: Taps) -> Tile:
    """Long runs along the contiguous dimension, and as many values a thread as its registers hold.

    256 channels (or 256 pixels of a planar row) are 512 bytes of a half dtype, four full sectors of a warp's store.
    2048 float32 sums of four warps leave registers for the loads of four taps in flight. Half of them where a value
    needs more, or they spilled when compiled: long sums, or pixels whose channels do not begin on 16 elements
    and are loaded one by one; and half again with several maps, whose loads the compiler brings together. Planar rows
    of several maps keep a table entry per pixel and map in registers: fewer pixels, more channels.
    """
    scalar = channels_last and channels % 16 > 0
    values = 1024 if scalar or LONG.value in (taps.y, taps.x) else 2048
    if maps > 1:
        values //= 2
    if channels_last:
        block = _run(channels, 256)
        return Tile(min(launch.power_of_two(width), values // block), block, 4, 168)
    block = _run(width, 256 if maps == 1 else 128)
    return Tile(block, min(launch.power_of_two(channels), values // block), 4, 168)


def _run(n: int, most: int) -> int:
    """Elements of the contiguous dimension in a tile: up to ``most`` if at most a ninth of all tiles lies outside."""
    for block in (256, 128, 64, 32):
        if block <= most and 8 * block * triton.cdiv(n, block) <= 9 * n:
            return block
    return min(launch.power_of_two(n), 32)


@triton.jit
def _upsample_sum(maps, bias, bias_stride, out, channels, height, width, CHANNELS_LAST: tl.constexpr,
                  BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
                  TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    x_tiles = tl.cdiv(width, BLOCK_X)
    c_tiles = tl.cdiv(channels, BLOCK_C)
    # Programs that run together write neighbouring memory.
    if CHANNELS_LAST:
        c_tile, rest = program % c_tiles, program // c_tiles
        x_tile, rest = rest % x_tiles, rest // x_tiles
        y, b = rest % height, rest // height
    else:
        x_tile, rest = program % x_tiles, program // x_tiles
        y, rest = rest % height, rest // height
        c_tile, b = rest % c_tiles, rest // c_tiles
    x = x_tile * BLOCK_X + tl.arange(0, BLOCK_X)
    c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    x_inside, c_inside = x < width, c < channels
    total = resampled_sum(maps, bias, bias_stride, b, y, x, c, x_inside, c_inside, BLOCK_X, BLOCK_C, TAPS_Y, TAPS_X)
    row = out.data + b.to(tl.int64) * out.stride_b + y.to(tl.int64) * out.stride_y
    pointers = row + (x.to(tl.int64) * out.stride_x)[:, None] + (c.to(tl.int64) * out.stride_c)[None, :]
    tl.store(pointers, total.to(out.data.dtype.element_ty), mask=x_inside[:, None] & c_inside[None, :])


def upsample_sum(features: list[Tensor], axes: Axes, bias: Tensor | None, out: Tensor) -> None:
    """``out = sum_s U_s features[s] + bias``; any strides of ``out``: tiles follow its contiguous dimension."""
    batch, channels, height, width = out.shape
    channels_last = launch.is_channels_last(out)
    taps = resample.taps_of(axes)
    tile = write_tile(len(features), channels, width, channels_last, taps)
    grid = (batch * height * triton.cdiv(width, tile.pixels) * triton.cdiv(channels, tile.channels),)
    with launch.on_device_of(out):
        _upsample_sum[grid](
            resample.resized_maps(features, axes),
            bias,
            resample.bias_stride(bias),
            launch.map_of(out),
            channels,
            height,
            width,
            CHANNELS_LAST=channels_last,
            BLOCK_X=tile.pixels,
            BLOCK_C=tile.channels,
            TAPS_Y=taps.y,
            TAPS_X=taps.x,
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )
