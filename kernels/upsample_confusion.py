"""Counts of labels and classes: a running maximum over chunks of classes, and how often a pixel has each pair."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch, resample
from murf_fast.kernels.aligned_maps import aligned_maps
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.best_class import best_class
from murf_fast.kernels.resample import Axes, resampled_sum

__all__ = ["upsample_confusion"]

# Pixels of a program: every one is compared with every other, 32 values a thread.
MOST_PIXELS = 64


@kernel
def _upsample_confusion(maps, readable, bias, bias_stride, target, ignore_index, counts, channels, height, width,
                        BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
                        TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    x_tiles = tl.cdiv(width, BLOCK_X)
    row = program // x_tiles
    b, y = row // height, row % height
    x = (program % x_tiles) * BLOCK_X + tl.arange(0, BLOCK_X)
    x_inside = x < width
    label = tl.load(target + row.to(tl.int64) * width + x, mask=x_inside, other=0).to(tl.int64)
    # A label that is no class is in no count, and never an address.
    used = x_inside & (label != ignore_index) & (label >= 0) & (label < channels)
    best = tl.full((BLOCK_X,), float("-inf"), dtype=tl.float32)
    index = tl.zeros((BLOCK_X,), dtype=tl.int32)
    start = 0
    while start < channels:
        c = start + tl.arange(0, BLOCK_C)
        c_inside = c < channels
        logits = resampled_sum(
            maps, readable, bias, bias_stride, b, y, x, c, used, c_inside, BLOCK_X, BLOCK_C, TAPS_Y, TAPS_X
        )
        best, index = best_class(logits, c, channels, best, index)
        start += BLOCK_C
    # Neighbours mostly have the same label and class, and one address takes one addition at a time: the last of equal
    # pairs adds all of them.
    lane = tl.arange(0, BLOCK_X)
    pair = tl.where(used, label * channels + index, -1)
    equal = pair[:, None] == pair[None, :]
    number = tl.sum(equal.to(tl.int32), axis=1)
    last = tl.max(tl.where(equal, lane[None, :], 0), axis=1)
    tl.atomic_add(counts + pair, number.to(tl.int64), mask=used & (last == lane), sem="relaxed")


def upsample_confusion(
    features: list[Tensor], axes: Axes, bias: Tensor | None, target: Tensor, ignore_index: int, counts: Tensor
) -> None:
    """Adds to ``counts`` (C, C), int64 and dense, the pixels of every label in ``target`` (B, H, W), dense, and class
    ``argmax_c(sum_s U_s features[s] + bias)``. A label that is no class is in no count.
    """
    batch, height, width = target.shape
    channels = features[0].shape[1]
    maps, readable = aligned_maps(features, height * width)
    tile, taps = resample.reduce_tile(len(features), channels, width), resample.taps_of(axes)
    pixels = min(tile.pixels, MOST_PIXELS)
    with launch.on_device_of(target):
        _upsample_confusion[(batch * height * launch.cdiv(width, pixels),)](
            resample.resized_maps(maps, axes),
            readable,
            bias,
            resample.bias_stride(bias),
            target,
            ignore_index,
            counts,
            channels,
            height,
            width,
            BLOCK_X=pixels,
            BLOCK_C=tile.channels,
            TAPS_Y=taps.y,
            TAPS_X=taps.x,
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )
