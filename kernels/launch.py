"""Launch choices: frozen results of pure functions of shapes and dtypes, and what every launch needs around it.

None of these numbers has been measured on a GPU yet. Each function says what they were chosen for; they change when a
measurement is recorded.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from murf_fast.resample import AxisTable

UNROLLED_ROWS = 2
UNROLLED_COLUMNS = 4


@dataclass(frozen=True)
class Tile:
    """What one program works on: pixels of one row times channels, with its warps and registers a thread at most.

    Naming a bound on the registers stops ptxas from aiming lower by itself, which spilled on sm_80 and sm_90.
    """

    pixels: int
    channels: int
    warps: int
    registers: int


@dataclass(frozen=True)
class Taps:
    """Tap counts to unroll, common to the maps of a launch; 0 stands for a loop of any length."""

    y: int
    x: int


@dataclass(frozen=True)
class ProductTile:
    """A tile of a matrix product of queries with bank rows, ``depth`` columns at a time."""

    queries: int
    rows: int
    depth: int
    warps: int
    stages: int
    registers: int


def nearest_tile(dtype: torch.dtype) -> ProductTile:
    """Half dtypes: 128 x 128 products and as many minima are 64 + 64 registers of each of 256 threads, which leaves
    room for the epilogue; three stages of 64 columns are 96 KB of shared memory. float32 runs without tensor cores.
    """
    if dtype == torch.float32:
        return ProductTile(64, 64, 32, 8, 2, 168)
    return ProductTile(128, 128, 64, 8, 3, 255)


def nearest_splits(queries: int, rows: int, tile: ProductTile, most_tiles: int) -> int:
    """Parts of the bank that are searched independently: enough programs for several waves on 132 multiprocessors,
    none with more tiles than their numbers have bits for, few enough that candidates stay few.
    """
    programs = -(-queries // tile.queries)
    tiles = -(-rows // tile.rows)
    wanted = max(-(-4 * 132 // programs), -(-tiles // most_tiles))
    return max(1, min(wanted, tiles))


def write_tile(channels: int, width: int, channels_last: bool) -> Tile:
    """Tiles of kernels that write full maps: long runs along the contiguous dimension, 16 values a thread.

    256 channels (or 256 pixels of a planar row) are 512 bytes of a half dtype, four full sectors of a warp's store;
    2048 float32 sums leave registers for the loads of four taps in flight.
    """
    if channels_last:
        block = min(_power_of_two(channels), 256)
        return Tile(min(_power_of_two(width), 2048 // block), block, 4, 168)
    block = min(_power_of_two(width), 256)
    return Tile(block, min(_power_of_two(channels), 2048 // block), 4, 168)


def reduce_tile(channels: int, width: int) -> Tile:
    """Tiles of kernels that reduce the channels of a pixel: a chunk of at most 64 classes (128 bytes of a half dtype),
    and pixels up to 1024 values, so that neighbouring pixels find their common cells in L1.
    """
    block = min(_power_of_two(channels), 64)
    return Tile(min(_power_of_two(width), 1024 // block), block, 4, 168)


def gather_tile(channels: int, width: int) -> Tile:
    """Tiles of gradients: every low-resolution cell gathers hundreds of pixels, so small tiles are what gives a map of
    56 x 56 cells more programs than a GPU has multiprocessors.
    """
    block = min(_power_of_two(channels), 64)
    return Tile(min(_power_of_two(width), 256 // block), block, 2, 168)


def unrolled(axes: list[tuple[AxisTable, AxisTable]]) -> Taps:
    """Bilinear cells (2 x 2) and bicubic runs (4) are unrolled. Sixteen bicubic cells at once spilled registers when
    compiled for sm_90; anything longer would only cost code and compilations.
    """
    y, x = max(a.taps for a, _ in axes), max(a.taps for _, a in axes)
    return Taps(y if y <= UNROLLED_ROWS else 0, x if x <= UNROLLED_COLUMNS else 0)


def map_arguments(features: list[Tensor], axes: list[tuple[AxisTable, AxisTable]]) -> tuple:
    """The maps as kernels take them: (data, strides, y table, x table) each; see :mod:`murf_fast.kernels.resample`."""
    return tuple(
        (f, *_strides(f), *table_arguments(y, f.device), *table_arguments(x, f.device))
        for f, (y, x) in zip(features, axes, strict=True)
    )


def table_arguments(table: AxisTable, device: torch.device) -> tuple:
    """(first, count, weights, taps)"""
    return (*table.on(device), table.taps)


def bias_stride(bias: Tensor | None) -> int:
    """Distance between the bias rows of two images; (1, C) serves every image."""
    return bias.shape[1] if bias is not None and bias.shape[0] > 1 else 0


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device and stream, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _strides(x: Tensor) -> tuple[int, ...]:
    # A stride along a dimension of one element is arbitrary; 0 keeps it from looking like the contiguous dimension.
    return tuple(s if n > 1 else 0 for n, s in zip(x.shape, x.stride(), strict=True))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
