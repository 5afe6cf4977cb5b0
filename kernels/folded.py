"""Per-pixel kernels folded into the source's grid, ``F = A_y^T K A_x``, and back, ``A_y F A_x^T``; and how much of them
exists at a time. The tables are those of :class:`murf_fast.tables.folded.FoldedAxis`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.tables.folded import FoldedAxis

# Folded kernels are written by one launch and read by the next, band by band: a band stays in the L2 cache (50 MB on an
# H100) and bounds the memory.
BAND_BYTES = 32 << 20


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
    tile = launch.fold_tile(y_axis.taps, x_axis.window)
    y_first, y_end, y_weights, _, _ = y_axis.on(kernels.device)
    x_first, x_end, x_weights, _, _ = x_axis.on(kernels.device)
    grid = (band.images * band.rows * triton.cdiv(x_axis.out_size, tile.pixels),)
    kernel[grid](
        kernels,
        *kernels.stride(),
        folded,
        y_first,
        y_end,
        y_weights,
        y_weights.shape[2],
        x_first,
        x_end,
        x_weights,
        x_weights.shape[2],
        y_axis.window,
        x_axis.window,
        band.row,
        band.rows,
        x_axis.out_size,
        TAPS=y_axis.taps,
        BLOCK_X=tile.pixels,
        BLOCK_T=tile.taps,
        BLOCK_M=tile.window,
        num_warps=tile.warps,
    )


@triton.jit
def line_of(width, BLOCK_X: tl.constexpr):
    """This program's line of the band and columns."""
    x_tiles = tl.cdiv(width, BLOCK_X)
    x = (tl.program_id(0) % x_tiles) * BLOCK_X + tl.arange(0, BLOCK_X)
    return tl.program_id(0) // x_tiles, x


@triton.jit
def taps_of_pixels(kernels, stride_b, stride_t, stride_y, stride_x, b, y, x, width,
                    TAPS: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """Pointers (x, i, j) to the kernels' taps of some pixels, and which of them exist."""
    i = tl.arange(0, BLOCK_T)[:, None]
    j = tl.arange(0, BLOCK_T)[None, :]
    taps = (i * TAPS + j).to(tl.int64) * stride_t
    pixels = kernels + b.to(tl.int64) * stride_b + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    inside = (x < width)[:, None, None] & ((i < TAPS) & (j < TAPS))[None, :, :]
    return pixels[:, None, None] + taps[None, :, :], inside


@triton.jit
def _x_shares(x_weights, x_window, x, m, width, count, TAPS: tl.constexpr, BLOCK_T: tl.constexpr):
    """(x, j, m): the share that tap j of pixel x gives to cell m of its window."""
    j = tl.arange(0, BLOCK_T)[None, :, None]
    inside = (x < width)[:, None, None] & (j < TAPS) & (m[None, None, :] < count[:, None, None])
    return tl.load(x_weights + (x[:, None, None] * TAPS + j) * x_window + m[None, None, :], mask=inside, other=0.0)


@triton.jit
def _fold(kernels, stride_b, stride_t, stride_y, stride_x, folded, y_first, y_end, y_weights, y_row, x_first, x_end,
          x_weights, x_row, y_window, x_window, row, rows, width,
          TAPS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    line, x = line_of(width, BLOCK_X)
    y = row + line % rows
    pointers, inside = taps_of_pixels(
        kernels, stride_b, stride_t, stride_y, stride_x, line // rows, line % rows, x, width, TAPS, BLOCK_T
    )
    taps = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    count = tl.load(x_end + x, mask=x < width, other=0) - tl.load(x_first + x, mask=x < width, other=0)
    count_y = tl.load(y_end + y) - tl.load(y_first + y)
    i = tl.arange(0, BLOCK_T)
    pixels = folded + (line.to(tl.int64) * width + x) * y_window * x_window
    start = 0
    while start < x_window:
        m = start + tl.arange(0, BLOCK_M)
        shares = _x_shares(x_weights, x_row, x, m, width, count, TAPS, BLOCK_T)
        n = 0
        while n < count_y:
            share = tl.load(y_weights + (y * TAPS + i) * y_row + n, mask=i < TAPS, other=0.0)
            row_of_taps = tl.sum(taps * share[None, :, None], axis=1)
            cells = tl.sum(row_of_taps[:, :, None] * shares, axis=1)
            tl.store(pixels[:, None] + (n * x_window + m)[None, :], cells, mask=m[None, :] < count[:, None])
            n += 1
        start += BLOCK_M


@triton.jit
def _unfold(kernels, stride_b, stride_t, stride_y, stride_x, folded, y_first, y_end, y_weights, y_row, x_first, x_end,
            x_weights, x_row, y_window, x_window, row, rows, width,
            TAPS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    line, x = line_of(width, BLOCK_X)
    y = row + line % rows
    pointers, inside = taps_of_pixels(
        kernels, stride_b, stride_t, stride_y, stride_x, line // rows, line % rows, x, width, TAPS, BLOCK_T
    )
    count = tl.load(x_end + x, mask=x < width, other=0) - tl.load(x_first + x, mask=x < width, other=0)
    count_y = tl.load(y_end + y) - tl.load(y_first + y)
    i = tl.arange(0, BLOCK_T)
    pixels = folded + (line.to(tl.int64) * width + x) * y_window * x_window
    taps = tl.zeros((BLOCK_X, BLOCK_T, BLOCK_T), dtype=tl.float32)
    start = 0
    while start < x_window:
        m = start + tl.arange(0, BLOCK_M)
        shares = _x_shares(x_weights, x_row, x, m, width, count, TAPS, BLOCK_T)
        n = 0
        while n < count_y:
            share = tl.load(y_weights + (y * TAPS + i) * y_row + n, mask=i < TAPS, other=0.0)
            used = m[None, :] < count[:, None]
            cells = tl.load(pixels[:, None] + (n * x_window + m)[None, :], mask=used, other=0.0)
            row_of_taps = tl.sum(cells[:, None, :] * shares, axis=2)
            taps += share[None, :, None] * row_of_taps[:, None, :]
            n += 1
        start += BLOCK_M
    tl.store(pointers, taps.to(kernels.dtype.element_ty), mask=inside)
