"""The class of the largest summed, resized logit of every pixel: a running maximum over chunks of classes."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch, resample
from murf_fast.kernels.aligned_maps import aligned_maps
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.best_class import best_class
from murf_fast.kernels.resample import Axes, resampled_sum

__all__ = ["upsample_argmax"]


@kernel
def _upsample_argmax(maps, readable, bias, bias_stride, labels, values, channels, height, width,
                     BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
                     TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    x_tiles = tl.cdiv(width, BLOCK_X)
    row = program // x_tiles
    b, y = row // height, row % height
    x = (program % x_tiles) * BLOCK_X + tl.arange(0, BLOCK_X)
    x_inside = x < width
    best = tl.full((BLOCK_X,), float("-inf"), dtype=tl.float32)
    index = tl.zeros((BLOCK_X,), dtype=tl.int32)
    start = 0
    while start < channels:
        c = start + tl.arange(0, BLOCK_C)
        c_inside = c < channels
        logits = resampled_sum(
            maps, readable, bias, bias_stride, b, y, x, c, x_inside, c_inside, BLOCK_X, BLOCK_C, TAPS_Y, TAPS_X
        )
        best, index = best_class(logits, c, channels, best, index)
        start += BLOCK_C
    at = row.to(tl.int64) * width + x
    tl.store(labels + at, index.to(labels.dtype.element_ty), mask=x_inside)
    if values is not None:
        tl.store(values + at, best.to(values.dtype.element_ty), mask=x_inside)


def upsample_argmax(
    features: list[Tensor],
    axes: Axes,
    bias: Tensor | None,
    labels: Tensor,
    values: Tensor | None,
) -> None:
    """``labels = argmax_c(sum_s U_s features[s] + bias)``, and the maxima in ``values``; both dense (B, H, W)."""
    batch, height, width = labels.shape
    channels = features[0].shape[1]
    maps, readable = aligned_maps(features, height * width)
    tile, taps = resample.reduce_tile(len(features), channels, width), resample.taps_of(axes)
    with launch.on_device_of(labels):
        _upsample_argmax[(batch * height * launch.cdiv(width, tile.pixels),)](
            resample.resized_maps(maps, axes),
            readable,
            bias,
            resample.bias_stride(bias),
            labels,
            values,
            channels,
            height,
            width,
            BLOCK_X=tile.pixels,
            BLOCK_C=tile.channels,
            TAPS_Y=taps.y,
            TAPS_X=taps.x,
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )
