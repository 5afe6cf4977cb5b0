"""Per-pixel kernels folded into the source's grid, ``F = A_y^T K A_x``, and back, ``A_y F A_x^T``; and how much of them
exists at a time. The tables are those of :class:`murf_fast.tables.folded.FoldedAxis`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.kernels.assembler import kernel
from murf_fast.tables.folded import FoldedAxis

# Folded kernels are written by one launch and read by the next, band by band: a band stays in the L2 cache (50 MB on an
# H100) and bounds the memory.
BAND_BYTES = 32 << 20


@dataclass(frozen=True)
class FoldTile:
    """One program of the folds: pixels of a row, taps along an axis, window cells at a time."""

    pixels: int
    taps: int
    window: int
    warps: int


def fold_tile(taps: int, window: int) -> FoldTile:
    """At most 4096 products of taps with cells at a time, 32 a thread."""
    block, cells = launch.power_of_two(taps), min(launch.power_of_two(window), 16)
    return FoldTile(max(1, min(32, 4096 // (block * max(block, cells)))), block, cells, 4)


class Windows(NamedTuple):
    """Rows and columns of one side of the tables by those of the other: from ``first`` up to and without ``end``."""

    y_first: Tensor
    y_end: Tensor
    x_first: Tensor
    x_end: Tensor


class Folded(NamedTuple):
    """Folded kernels (images, window, window, rows, width) as kernels take them, by window row n and column m."""

    data: Tensor
    stride_b: int
    stride_n: int
    stride_m: int
    stride_y: int
    stride_x: int


class Axis(NamedTuple):
    """A :class:`FoldedAxis` on a device: ``weights`` (out_size, taps, stride), of which ``window`` cells count."""

    first: Tensor
    end: Tensor
    weights: Tensor
    stride: int
    window: int


@dataclass(frozen=True)
class Band:
    """Images and rows that are worked on together."""

    image: int
    images: int
    row: int
    rows: int


def bands(batch: int, rows: int, row_bytes: int, step: int) -> Iterator[Band]:
    """Bands of about :data:`BAND_BYTES`: several images, or a multiple of ``step`` rows of one."""
    image_bytes = rows * row_bytes
    if image_bytes <= BAND_BYTES:
        images = max(1, BAND_BYTES // max(image_bytes, 1))
        for image in range(0, batch, images):
            yield Band(image, min(images, batch - image), 0, rows)
        return
    height = max(BAND_BYTES // row_bytes // step, 1) * step
    for image in range(batch):
        for row in range(0, rows, height):
            yield Band(image, 1, row, min(height, rows - row))


def row_bytes(y_axis: FoldedAxis, x_axis: FoldedAxis) -> int:
    """Bytes of one folded row."""
    return x_axis.out_size * y_axis.window * x_axis.window * 4


def empty(band: Band, y_axis: FoldedAxis, x_axis: FoldedAxis, device: torch.device) -> Tensor:
    """Room for a band's folded kernels, (images, window, window, rows, width); those of a pixel are consecutive."""
    shape = (band.images, max(band.rows, 1), x_axis.out_size, y_axis.window, x_axis.window)
    return torch.empty(shape, dtype=torch.float32, device=device).permute(0, 3, 4, 1, 2)


def rows_of(x: Tensor, band: Band) -> Tensor:
    """The band of a map (B, C, H, W)."""
    return x[band.image : band.image + band.images, :, band.row : band.row + band.rows]


def fold(kernels: Tensor, y_axis: FoldedAxis, x_axis: FoldedAxis, band: Band, out: Tensor) -> None:
    """``out = A_y^T K A_x``, for the band's ``kernels`` (images, D * D, rows, width)."""
    _launch(_fold, kernels, out, y_axis, x_axis, band)


def unfold(folded: Tensor, y_axis: FoldedAxis, x_axis: FoldedAxis, band: Band, out: Tensor) -> None:
    """``out = A_y F A_x^T``, for the band's ``out`` (images, D * D, rows, width): the gradient of :func:`fold`."""
    _launch(_unfold, out, folded, y_axis, x_axis, band)


def _launch(kernel, kernels: Tensor, folded: Tensor, y_axis: FoldedAxis, x_axis: FoldedAxis, band: Band) -> None:
    if not band.rows:
        return
    tile = fold_tile(y_axis.taps, x_axis.window)
    grid = (band.images * band.rows * launch.cdiv(x_axis.out_size, tile.pixels),)
    kernel[grid](
        launch.map_of(kernels),
        folded,
        _axis(y_axis, kernels.device),
        _axis(x_axis, kernels.device),
        band.row,
        band.rows,
        x_axis.out_size,
        TAPS=y_axis.taps,
        BLOCK_X=tile.pixels,
        BLOCK_T=tile.taps,
        BLOCK_M=tile.window,
        num_warps=tile.warps,
    )


def windows_of(axes: tuple[FoldedAxis, FoldedAxis], device: torch.device) -> tuple[Windows, Windows]:
    """Cells that every output reads, and outputs that read every cell."""
    y, x = (axis.on(device) for axis in axes)
    return Windows(*y[:2], *x[:2]), Windows(*y[3:], *x[3:])


def _axis(axis: FoldedAxis, device: torch.device) -> Axis:
    first, end, weights, _, _ = axis.on(device)
    return Axis(first, end, weights, weights.shape[2], axis.window)


@triton.jit
def line_of(width, BLOCK_X: tl.constexpr):
    """This program's line of the band and columns."""
    x_tiles = tl.cdiv(width, BLOCK_X)
    x = (tl.program_id(0) % x_tiles) * BLOCK_X + tl.arange(0, BLOCK_X)
    return tl.program_id(0) // x_tiles, x


@triton.jit
def taps_of_pixels(kernels, b, y, x, width, TAPS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Pointers (x, i, j) to the kernels' taps of some pixels, and which of them exist."""
    i = tl.arange(0, BLOCK_T)[:, None]
    j = tl.arange(0, BLOCK_T)[None, :]
    taps = (i * TAPS + j).to(tl.int64) * kernels.stride_c
    pixels = kernels.data + b.to(tl.int64) * kernels.stride_b + y.to(tl.int64) * kernels.stride_y
    pixels += x.to(tl.int64) * kernels.stride_x
    inside = (x < width)[:, None, None] & ((i < TAPS) & (j < TAPS))[None, :, :]
    return pixels[:, None, None] + taps[None, :, :], inside


@triton.jit
def _x_shares(axis, x, m, width, count, TAPS: tl.constexpr, BLOCK_T: tl.constexpr):
    """(x, j, m): the share that tap j of pixel x gives to cell m of its window."""
    j = tl.arange(0, BLOCK_T)[None, :, None]
    inside = (x < width)[:, None, None] & (j < TAPS) & (m[None, None, :] < count[:, None, None])
    return tl.load(
        axis.weights + (x[:, None, None] * TAPS + j) * axis.stride + m[None, None, :], mask=inside, other=0.0
    )


@kernel
def _fold(kernels, folded, y_axis, x_axis, row, rows, width,
          TAPS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    line, x = line_of(width, BLOCK_X)
    y = row + line % rows
    pointers, inside = taps_of_pixels(kernels, line // rows, line % rows, x, width, TAPS, BLOCK_T)
    taps = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    count = tl.load(x_axis.end + x, mask=x < width, other=0) - tl.load(x_axis.first + x, mask=x < width, other=0)
    count_y = tl.load(y_axis.end + y) - tl.load(y_axis.first + y)
    i = tl.arange(0, BLOCK_T)
    pixels = folded + (line.to(tl.int64) * width + x) * y_axis.window * x_axis.window
    start = 0
    while start < x_axis.window:
        m = start + tl.arange(0, BLOCK_M)
        shares = _x_shares(x_axis, x, m, width, count, TAPS, BLOCK_T)
        n = 0
        while n < count_y:
            share = tl.load(y_axis.weights + (y * TAPS + i) * y_axis.stride + n, mask=i < TAPS, other=0.0)
            row_of_taps = tl.sum(taps * share[None, :, None], axis=1)
            cells = tl.sum(row_of_taps[:, :, None] * shares, axis=1)
            tl.store(pixels[:, None] + (n * x_axis.window + m)[None, :], cells, mask=m[None, :] < count[:, None])
            n += 1
        start += BLOCK_M


@kernel
def _unfold(kernels, folded, y_axis, x_axis, row, rows, width,
            TAPS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    line, x = line_of(width, BLOCK_X)
    y = row + line % rows
    pointers, inside = taps_of_pixels(kernels, line // rows, line % rows, x, width, TAPS, BLOCK_T)
    count = tl.load(x_axis.end + x, mask=x < width, other=0) - tl.load(x_axis.first + x, mask=x < width, other=0)
    count_y = tl.load(y_axis.end + y) - tl.load(y_axis.first + y)
    i = tl.arange(0, BLOCK_T)
    pixels = folded + (line.to(tl.int64) * width + x) * y_axis.window * x_axis.window
    taps = tl.zeros((BLOCK_X, BLOCK_T, BLOCK_T), dtype=tl.float32)
    start = 0
    while start < x_axis.window:
        m = start + tl.arange(0, BLOCK_M)
        shares = _x_shares(x_axis, x, m, width, count, TAPS, BLOCK_T)
        n = 0
        while n < count_y:
            share = tl.load(y_axis.weights + (y * TAPS + i) * y_axis.stride + n, mask=i < TAPS, other=0.0)
            used = m[None, :] < count[:, None]
            cells = tl.load(pixels[:, None] + (n * x_axis.window + m)[None, :], mask=used, other=0.0)
            row_of_taps = tl.sum(cells[:, None, :] * shares, axis=2)
            taps += share[None, :, None] * row_of_taps[:, None, :]
            n += 1
        start += BLOCK_M
    tl.store(pointers, taps.to(kernels.data.dtype.element_ty), mask=inside)
