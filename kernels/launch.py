"""Launch choices: frozen results of pure functions of shapes and dtypes, and what every launch needs around it.

None of these numbers has been measured on a GPU yet. Each function says what they were chosen for; they change when a
measurement is recorded.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from murf_fast.tables.resize import AxisTable

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


@dataclass(frozen=True)
class AttentionTile:
    """Queries and keys of one matrix product, how many channels of each map are read at a time, and as for Tile."""

    queries: int
    keys: int
    head_dim: int
    channels: int
    warps: int
    registers: int


def attention_tile(queries: int, head_dim: int, channels: int) -> AttentionTile:
    """Tiles of window attention: one block of queries, keys in chunks of 32; 16 is the least a matrix product takes.

    64 queries on four warps spilled when compiled for sm_90, in float32 and in half precision; eight warps hold them.
    """
    block = max(_power_of_two(queries), 16)
    return AttentionTile(
        block,
        32,
        min(max(_power_of_two(head_dim), 16), 64),
        min(max(_power_of_two(channels), 16), 64),
        8 if block > 16 else 4,
        255,
    )


@dataclass(frozen=True)
class UnifyTile:
    """Filters and channels of one pixel worked on at a time, and as for Tile."""

    filters: int
    channels: int
    warps: int
    registers: int


def unify_tile(filters: int) -> UnifyTile:
    """All filters, for the softmax goes over them, and 2048 responses: 16 values a thread."""
    block = _power_of_two(filters)
    return UnifyTile(block, max(2048 // block, 1), 4, 168)


def unrolled(axes: list[tuple[AxisTable, AxisTable]]) -> Taps:
    """Bilinear cells (2 x 2) and bicubic runs (4) are unrolled. Sixteen bicubic cells at once spilled registers when
    compiled for sm_90; anything longer would only cost code and compilations.
    """
    y, x = max(a.taps for a, _ in axes), max(a.taps for _, a in axes)
    return Taps(y if y <= UNROLLED_ROWS else 0, x if x <= UNROLLED_COLUMNS else 0)


@dataclass(frozen=True)
class WindowTile:
    """One program of an adaptive convolution: rows x columns of pixels, channels, and cells of the region they read
    that are multiplied at a time.
    """

    rows: int
    columns: int
    channels: int
    cells: int
    warps: int
    registers: int


@dataclass(frozen=True)
class FoldTile:
    """One program of the folds: pixels of a row, taps along an axis, window cells at a time."""

    pixels: int
    taps: int
    window: int
    warps: int


@dataclass(frozen=True)
class SimilarityTile:
    """One program of the range softmax: pixels of a row, taps along an axis, and keys at a time."""

    pixels: int
    taps: int
    keys: int
    warps: int


def window_tile(out: Tensor) -> WindowTile:
    """64 pixels, square where the channels are contiguous: 8 x 8 pixels of a bicubic doubling read 10 x 10 cells. A
    planar result is written in runs of sixteen pixels. float32 products run outside the tensor cores, where operands
    wait in registers: they get fewer cells at a time. Eight warps share the addresses of pixels times cells.
    """
    rows, columns = (8, 8) if _channels_contiguous(out) else (4, 16)
    block = max(16, min(_power_of_two(out.shape[1]), 64))
    return WindowTile(rows, columns, block, 16 if out.dtype == torch.float32 else 32, 8, 128)


def products_tile(grad: Tensor) -> WindowTile:
    """As above; 64 cells at a time cover the region of 8 x 8 pixels in two rounds over the channels. float32 at 128
    registers spilled when compiled for sm_100.
    """
    block, registers = (16, 168) if grad.dtype == torch.float32 else (64, 128)
    return WindowTile(8, 8, max(16, min(_power_of_two(grad.shape[1]), block)), 64, 8, registers)


def fold_tile(taps: int, window: int) -> FoldTile:
    """At most 4096 products of taps with cells at a time, 32 a thread."""
    block, cells = _power_of_two(taps), min(_power_of_two(window), 16)
    return FoldTile(max(1, min(32, 4096 // (block * max(block, cells)))), block, cells, 4)


def similarity_tile(diameter: int, keys: int) -> SimilarityTile:
    """At most 8192 products of keys for one row of taps at a time, 64 a thread in flight."""
    taps, block = _power_of_two(diameter), min(_power_of_two(keys), 32)
    return SimilarityTile(max(1, min(32, 8192 // (taps * max(block, taps)))), taps, block, 4)


@dataclass(frozen=True)
class PixelTile:
    """One program of a pointwise layer: pixels, and inputs of the product at a time; it makes all outputs."""

    pixels: int
    depth: int
    warps: int
    registers: int


def pixel_tile(dtype: torch.dtype, rotates: bool) -> PixelTile:
    """Sums of 64 pixels x 128 channels are 32 registers of each of 256 threads. Angles need as many again, and spilled
    at 64 pixels. float32 products run outside the tensor cores, where operands wait in registers: half the pixels, and
    fewer inputs at a time.
    """
    if dtype == torch.float32:
        return PixelTile(32, 16, 8, 168)
    return PixelTile(32 if rotates else 64, 32, 8, 255)


def dot_precision() -> str:
    """float32 products are exact unless the user has allowed TF32 to torch."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


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


def _channels_contiguous(x: Tensor) -> bool:
    return x.stride(1) == 1 and not x.is_contiguous()


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
