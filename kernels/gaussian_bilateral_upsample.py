"""Joint bilateral upsampling with a Gaussian for every cell: a running softmax over the cells of a tile of pixels.

A program has eight by eight pixels and a block of channels. It forms the weights of 16 cells at a time and multiplies
them with those cells' values on tensor cores; nothing of a window is in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.gaussian_bilateral import (
    BLOCK_Q,
    PIXELS,
    SIDE,
    cells_of,
    grids_of,
    logs_of,
    pixels_of,
    tables_of,
    window_of,
)
from murf_fast.kernels.launch import bound, map_of
from murf_fast.kernels.products import product

__all__ = ["gaussian_bilateral_upsample"]


@dataclass(frozen=True)
class GaussianTile:
    """Channels of a program, and its warps."""

    channels: int
    warps: int


def gaussian_tile(channels: int) -> GaussianTile:
    """The weights are formed again for every block of channels, at the price of some 40 operations a weight beside 256
    for 128 channels; 64 sums a thread.
    """
    block = min(max(launch.power_of_two(channels), 16), 128)
    return GaussianTile(block, 8)


@kernel
def _gaussian_bilateral_upsample(features, out, grids, tables, channels, BLOCK_C: tl.constexpr,
                                 PRECISION: tl.constexpr):  # fmt: skip
    c_tiles, x_tiles, y_tiles = tl.cdiv(channels, BLOCK_C), tl.cdiv(grids.width, SIDE), tl.cdiv(grids.height, SIDE)
    c_tile, rest = tl.program_id(0) % c_tiles, tl.program_id(0) // c_tiles
    top, left = rest // x_tiles % y_tiles * SIDE, rest % x_tiles * SIDE
    b = rest // (x_tiles * y_tiles)
    pixels = pixels_of(grids, tables, b, top, left, grids.height, grids.width)
    first_i, first_j, columns, count = window_of(grids, tables, top, left)
    c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    values = features.data + b.to(tl.int64) * features.stride_b + c.to(tl.int64)[None, :] * features.stride_c
    largest = tl.full((PIXELS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((PIXELS,), dtype=tl.float32)
    result = tl.zeros((PIXELS, BLOCK_C), dtype=tl.float32)
    for step in range(bound(tl.cdiv(count, BLOCK_Q))):
        cells = cells_of(grids, b, first_i, first_j, columns, count, step)
        logs, _, _, _ = logs_of(grids, tables, b, pixels, cells)
        peak = tl.maximum(largest, tl.max(logs, axis=1))
        # Before a pixel has met a cell of its window.
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        weights = tl.exp(logs - shift[:, None])
        before = tl.exp(largest - shift)
        total = total * before + tl.sum(weights, axis=1)
        at = cells.i.to(tl.int64) * features.stride_y + cells.j.to(tl.int64) * features.stride_x
        value = tl.load(values + at[:, None], mask=cells.used[:, None] & (c < channels)[None, :], other=0.0)
        result = product(weights, value, result * before[:, None], PRECISION)
        largest = peak
    result *= (1.0 / total)[:, None]
    at = pixels.y.to(tl.int64) * out.stride_y + pixels.x.to(tl.int64) * out.stride_x
    to = out.data + b.to(tl.int64) * out.stride_b + at[:, None] + c.to(tl.int64)[None, :] * out.stride_c
    tl.store(to, result.to(out.data.dtype.element_ty), mask=pixels.inside[:, None] & (c < channels)[None, :])


def gaussian_bilateral_upsample(
    features: Tensor, guidance: Tensor, cells: Tensor, radii: Tensor | None, radius: int, out: Tensor
) -> None:
    """Features (B, C, h, w), guidance (B, G, H, W) float32, cells (B, h, w, 5 + G) float32 as the op makes them, radii
    (B, 1, H, W) uint8 or None for ``radius``; ``out`` (B, C, H, W) of any strides in the dtype of the features.
    """
    batch, channels, height, width = out.shape
    tile = gaussian_tile(channels)
    tiles = batch * launch.cdiv(height, SIDE.value) * launch.cdiv(width, SIDE.value)
    with launch.on_device_of(out):
        _gaussian_bilateral_upsample[(tiles * launch.cdiv(channels, tile.channels),)](
            map_of(features),
            map_of(out),
            grids_of(guidance, cells, radius),
            tables_of(guidance, cells, radii, radius),
            channels,
            BLOCK_C=tile.channels,
            PRECISION=launch.dot_precision(),
            num_warps=tile.warps,
        )
