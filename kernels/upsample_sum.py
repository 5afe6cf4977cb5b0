"""Maps resized to one grid and summed: every value of the result is written once, in float32 arithmetic."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.kernels.resample import resampled_sum
from murf_fast.tables.resize import AxisTable

__all__ = ["upsample_sum"]


@triton.jit
def _upsample_sum(maps, bias, bias_stride, out, out_stride_b, out_stride_c, out_stride_y, out_stride_x,
                  channels, height, width, CHANNELS_LAST: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
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
    row = out + b.to(tl.int64) * out_stride_b + y.to(tl.int64) * out_stride_y
    pointers = row + (x.to(tl.int64) * out_stride_x)[:, None] + (c.to(tl.int64) * out_stride_c)[None, :]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=x_inside[:, None] & c_inside[None, :])


def upsample_sum(
    features: list[Tensor], axes: list[tuple[AxisTable, AxisTable]], bias: Tensor | None, out: Tensor
) -> None:
    """``out = sum_s U_s features[s] + bias``; any strides of ``out``: tiles follow its contiguous dimension."""
    batch, channels, height, width = out.shape
    channels_last = out.stride(1) == 1 and not out.is_contiguous()
    tile, taps = launch.write_tile(channels, width, channels_last), launch.unrolled(axes)
    grid = (batch * height * triton.cdiv(width, tile.pixels) * triton.cdiv(channels, tile.channels),)
    with launch.on_device_of(out):
        _upsample_sum[grid](
            launch.map_arguments(features, axes),
            bias,
            launch.bias_stride(bias),
            out,
            *out.stride(),
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
