"""A convolution with a kernel of its own at every pixel, and its gradients, as products of tiles.

Resize and padding are folded into the kernels first (:mod:`murf_fast.kernels.folded`). The pixels of a tile then read
one small region of the source, 10 x 10 cells for 8 x 8 pixels of a bicubic doubling, and their folded kernels form a
matrix (pixels, cells), mostly dense, that multiplies the region (cells, channels). Gradients are the transposed
products: each is a gather, so nothing depends on the order of programs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from murf_fast._layout import is_channels_last
from murf_fast.kernels import folded, launch
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.folded import Folded
from murf_fast.kernels.launch import map_of
from murf_fast.kernels.products import product
from murf_fast.tables.folded import FoldedAxis

__all__ = ["adaptive_conv", "adaptive_conv_backward_kernels", "adaptive_conv_backward_source"]

Axes = tuple[FoldedAxis, FoldedAxis]


@dataclass(frozen=True)
class ConvTile:
    """One program: rows x columns of pixels, channels, and cells of the region they read that are multiplied at a time;
    its warps and registers a thread at most.
    """

    rows: int
    columns: int
    channels: int
    cells: int
    warps: int
    registers: int


def conv_tile(out: Tensor) -> ConvTile:
    """64 pixels, square where the channels are contiguous: 8 x 8 pixels of a bicubic doubling read 10 x 10 cells. A
    planar result is written in runs of sixteen pixels. The weights of pixels times cells are gathered anew for every
    block of channels, so blocks are large: 64 sums a thread in half precision; in float32, whose parts take registers
    for tensor cores, that spilled when compiled for sm_80 and sm_100.
    """
    rows, columns = (8, 8) if is_channels_last(out) else (4, 16)
    block, cells = (64, 16) if out.dtype == torch.float32 else (128, 32)
    return ConvTile(rows, columns, max(16, min(launch.power_of_two(out.shape[1]), block)), cells, 4, 255)


def products_tile(grad: Tensor) -> ConvTile:
    """As above; 64 cells at a time cover the region of 8 x 8 pixels in two rounds over the channels. In float32 four
    warps, so that each splits fewer operands in parts that others split, too.
    """
    block, warps, registers = (32, 4, 255) if grad.dtype == torch.float32 else (64, 8, 128)
    return ConvTile(8, 8, max(16, min(launch.power_of_two(grad.shape[1]), block)), 64, warps, registers)


@triton.jit
def _tile(programs_before, height, width, regions, row, rows,
          TILE_Y: tl.constexpr, TILE_X: tl.constexpr):  # fmt: skip
    """(image in the band, y, x, which exist, and the (top, left, height, width) of what they read) of one tile."""
    x_tiles, y_tiles = tl.cdiv(width, TILE_X), tl.cdiv(rows, TILE_Y)
    image = programs_before // x_tiles // y_tiles
    pixel = tl.arange(0, TILE_Y * TILE_X)
    y = row + (programs_before // x_tiles % y_tiles) * TILE_Y + pixel // TILE_X
    x = (programs_before % x_tiles) * TILE_X + pixel % TILE_X
    inside = (y < tl.minimum(row + rows, height)) & (x < width)
    top = tl.min(tl.load(regions.y_first + y, mask=inside, other=2147483647))
    left = tl.min(tl.load(regions.x_first + x, mask=inside, other=2147483647))
    bottom = tl.max(tl.load(regions.y_end + y, mask=inside, other=0))
    right = tl.max(tl.load(regions.x_end + x, mask=inside, other=0))
    return image, y, x, inside, top, left, tl.maximum(bottom - top, 0), tl.maximum(right - left, 0)


@triton.jit
def _share(data, weights, first_row, y, x, n, m, inside, windows):
    """What window cell (n, m) gives to output (y, x), which exist where ``inside``; and which pairs belong together.

    ``data``: the image's folded kernels; their first row is row ``first_row`` of the output.
    """
    top = tl.load(windows.y_first + y, mask=inside, other=0)
    left = tl.load(windows.x_first + x, mask=inside, other=0)
    used = inside & (n >= top) & (n < tl.load(windows.y_end + y, mask=inside, other=0))
    used &= (m >= left) & (m < tl.load(windows.x_end + x, mask=inside, other=0))
    at = (y - first_row).to(tl.int64) * weights.stride_y + x.to(tl.int64) * weights.stride_x
    at += (n - top).to(tl.int64) * weights.stride_n + (m - left).to(tl.int64) * weights.stride_m
    return tl.load(data + at, mask=used, other=0.0), used


@kernel
def _adaptive_conv(source, weights, bias, out, windows, regions, channels, height, width, first_image, first_row, row,
                   rows, ADJOINT: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
                   BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A tile of pixels of ``out`` times a block of channels.

    ``windows``: source cells that every output reads. ``regions``: what a pixel of ``out`` reads. That is the same, but
    with ADJOINT ``out`` is the gradient of the source, and its pixels gather from the outputs that read them.
    """
    c_tiles = tl.cdiv(channels, BLOCK_C)
    image, y, x, inside, top, left, region_height, region_width = _tile(
        tl.program_id(0) // c_tiles, height, width, regions, row, rows, TILE_Y, TILE_X
    )
    c = (tl.program_id(0) % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    shares = weights.data + image.to(tl.int64) * weights.stride_b
    b = (first_image + image).to(tl.int64)
    data = source.data + b * source.stride_b
    total = tl.zeros((TILE_Y * TILE_X, BLOCK_C), dtype=tl.float32)
    cells = region_height * region_width
    start = 0
    while start < cells:
        r = start + tl.arange(0, BLOCK_R)
        n, m, exists = top + r // region_width, left + r % region_width, r < cells
        if ADJOINT:
            # Cells outermost: neighbouring pixels of a tile are neighbours in the cell's folded kernel.
            share, _ = _share(
                shares, weights, first_row, n[:, None], m[:, None], y[None, :],
                x[None, :], exists[:, None] & inside[None, :], windows
            )  # fmt: skip
            share = tl.trans(share)
        else:
            share, _ = _share(
                shares, weights, first_row, y[:, None], x[:, None], n[None, :],
                m[None, :], inside[:, None] & exists[None, :], windows
            )  # fmt: skip
        pixels = data + n.to(tl.int64) * source.stride_y + m.to(tl.int64) * source.stride_x
        pointers = pixels[:, None] + (c.to(tl.int64) * source.stride_c)[None, :]
        value = tl.load(pointers, mask=exists[:, None] & (c < channels)[None, :], other=0.0)
        if source.data.dtype.element_ty == tl.float32:
            total = product(share, value, total, PRECISION)
        else:
            # The tensor cores take half precision: float32 weights go in two parts.
            high = share.to(source.data.dtype.element_ty)
            total = tl.dot(high, value, total)
            if share.dtype == tl.float32:
                low = (share - high.to(tl.float32)).to(source.data.dtype.element_ty)
                total = tl.dot(low, value, total)
        start += BLOCK_R
    # The product multiplies pixels by the zeros of kernels that do not read them. If that was not nothing (0 * inf), or
    # a weight is beyond half precision, the tile is computed again, cell by cell.
    if tl.max(tl.where(tl.abs(total) < float("inf"), 0, 1)) > 0:
        total = tl.zeros((TILE_Y * TILE_X, BLOCK_C), dtype=tl.float32)
        start = 0
        while start < cells:
            n, m = tl.zeros_like(y) + (top + start // region_width), tl.zeros_like(x) + (left + start % region_width)
            if ADJOINT:
                share, used = _share(
                    shares, weights, first_row, n, m, y, x, inside, windows
                )  # fmt: skip
            else:
                share, used = _share(
                    shares, weights, first_row, y, x, n, m, inside, windows
                )  # fmt: skip
            pixels = data + n.to(tl.int64) * source.stride_y + m.to(tl.int64) * source.stride_x
            pointers = pixels[:, None] + (c.to(tl.int64) * source.stride_c)[None, :]
            value = tl.load(pointers, mask=used[:, None] & (c < channels)[None, :], other=0.0).to(tl.float32)
            total += share.to(tl.float32)[:, None] * value
            start += 1
    if bias is not None:
        total += tl.load(bias + c, mask=c < channels, other=0.0)[None, :]
    pixels = out.data + b * out.stride_b + y.to(tl.int64) * out.stride_y + x.to(tl.int64) * out.stride_x
    pointers = pixels[:, None] + (c.to(tl.int64) * out.stride_c)[None, :]
    tl.store(pointers, total.to(out.data.dtype.element_ty), mask=inside[:, None] & (c < channels)[None, :])


@kernel
def _adaptive_conv_backward_kernels(
        grad, source, weights, windows, channels, height, width, first_image, row, rows,
        TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
        PRECISION: tl.constexpr):  # fmt: skip
    """Products of a tile's gradients with the region that the tile reads; each pixel keeps those of its window."""
    image, y, x, inside, top, left, region_height, region_width = _tile(
        tl.program_id(0), height, width, windows, row, rows, TILE_Y, TILE_X
    )
    b = (first_image + image).to(tl.int64)
    data = source.data + b * source.stride_b
    gradients = grad.data + b * grad.stride_b + y.to(tl.int64) * grad.stride_y + x.to(tl.int64) * grad.stride_x
    window_top, window_left = (
        tl.load(windows.y_first + y, mask=inside, other=0),
        tl.load(windows.x_first + x, mask=inside, other=0),
    )
    window_bottom, window_right = (
        tl.load(windows.y_end + y, mask=inside, other=0),
        tl.load(windows.x_end + x, mask=inside, other=0),
    )
    outputs = weights.data + image.to(tl.int64) * weights.stride_b
    outputs += (y - row).to(tl.int64) * weights.stride_y + x.to(tl.int64) * weights.stride_x
    cells = region_height * region_width
    start = 0
    while start < cells:
        r = start + tl.arange(0, BLOCK_R)
        n, m, exists = top + r // region_width, left + r % region_width, r < cells
        pixels = data + n.to(tl.int64) * source.stride_y + m.to(tl.int64) * source.stride_x
        total = tl.zeros((TILE_Y * TILE_X, BLOCK_R), dtype=tl.float32)
        begin = 0
        while begin < channels:
            c = begin + tl.arange(0, BLOCK_C)
            mask = inside[:, None] & (c < channels)[None, :]
            upstream = tl.load(gradients[:, None] + (c.to(tl.int64) * grad.stride_c)[None, :], mask=mask, other=0.0)
            mask = exists[:, None] & (c < channels)[None, :]
            value = tl.load(pixels[:, None] + (c.to(tl.int64) * source.stride_c)[None, :], mask=mask, other=0.0)
            if value.dtype == tl.float32:
                total = product(upstream, tl.trans(value), total, PRECISION)
            else:
                total = tl.dot(upstream, tl.trans(value), total)
            begin += BLOCK_C
        used = inside[:, None] & exists[None, :]
        used &= (n[None, :] >= window_top[:, None]) & (n[None, :] < window_bottom[:, None])
        used &= (m[None, :] >= window_left[:, None]) & (m[None, :] < window_right[:, None])
        at = (n[None, :] - window_top[:, None]).to(tl.int64) * weights.stride_n
        at += (m[None, :] - window_left[:, None]).to(tl.int64) * weights.stride_m
        tl.store(outputs[:, None] + at, total.to(weights.data.dtype.element_ty), mask=used)
        start += BLOCK_R


def adaptive_conv(source: Tensor, kernels: Tensor, bias: Tensor | None, axes: Axes, out: Tensor) -> None:
    """``out = bias + sum of folded kernels times source pixels``; any strides of ``out``."""
    batch, _, height, _ = out.shape
    for band in folded.bands(batch, height, folded.row_bytes(*axes), conv_tile(out).rows):
        adaptive_conv_band(source, folded.rows_of(kernels, band), bias, axes, out, band)


def adaptive_conv_band(
    source: Tensor, kernels: Tensor, bias: Tensor | None, axes: Axes, out: Tensor, band: folded.Band
) -> None:
    """The band of ``out``, whose kernels are all that ``kernels`` (images, D * D, rows, width) holds."""
    with launch.on_device_of(out):
        windows, _ = folded.windows_of(axes, out.device)
        weights = _folded(kernels, axes, band)
        _launch(source, weights, bias, out, windows, windows, band, band.row, conv_tile(out), adjoint=False)


def adaptive_conv_backward_source(grad: Tensor, kernels: Tensor, axes: Axes, out: Tensor) -> None:
    """``out`` gathers, for every pixel of the source, the gradients of the outputs that read it."""
    y_axis = axes[0]
    tile = conv_tile(out)
    # A band of source rows folds all rows of kernels that read it.
    bytes_of_a_row = launch.cdiv(folded.row_bytes(*axes) * y_axis.out_size, y_axis.in_size)
    with launch.on_device_of(out):
        windows, readers = folded.windows_of(axes, out.device)
        for band in folded.bands(out.shape[0], y_axis.in_size, bytes_of_a_row, tile.rows):
            rows = slice(band.row, band.row + band.rows)
            first, end = int(y_axis.reader_begin[rows].min()), int(y_axis.reader_end[rows].max())
            read = folded.Band(band.image, band.images, first, max(end - first, 0))
            weights = _folded(folded.rows_of(kernels, read), axes, read)
            _launch(grad, weights, None, out, windows, readers, band, first, tile, adjoint=True)


def adaptive_conv_backward_kernels(grad: Tensor, source: Tensor, axes: Axes, out: Tensor) -> None:
    """``out = A_y (products of gradients with source windows) A_x^T``."""
    y_axis, x_axis = axes
    batch, channels, height, width = grad.shape
    tile = products_tile(grad)
    with launch.on_device_of(out):
        windows, _ = folded.windows_of(axes, out.device)
        for band in folded.bands(batch, height, folded.row_bytes(*axes), tile.rows):
            direct = y_axis.is_shift and x_axis.is_shift
            rows = folded.rows_of(out, band)
            weights = _as_windows(rows, axes) if direct else folded.empty(band, *axes, out.device)
            grid = (band.images * launch.cdiv(band.rows, tile.rows) * launch.cdiv(width, tile.columns),)
            _adaptive_conv_backward_kernels[grid](
                map_of(grad),
                map_of(source),
                Folded(weights, *weights.stride()),
                windows,
                channels,
                height,
                width,
                band.image,
                band.row,
                band.rows,
                TILE_Y=tile.rows,
                TILE_X=tile.columns,
                BLOCK_C=tile.channels,
                BLOCK_R=tile.cells,
                PRECISION=launch.dot_precision(),
                num_warps=tile.warps,
                maxnreg=tile.registers,
            )
            if not direct:
                folded.unfold(weights, y_axis, x_axis, band, rows)


def _folded(kernels: Tensor, axes: Axes, band: folded.Band) -> Tensor:
    """The band's ``kernels`` (images, D * D, rows, width), folded: (images, window, window, rows, width)."""
    if axes[0].is_shift and axes[1].is_shift:
        return _as_windows(kernels, axes)
    weights = folded.empty(band, *axes, kernels.device)
    folded.fold(kernels, *axes, band, weights)
    return weights


def _as_windows(kernels: Tensor, axes: Axes) -> Tensor:
    """Without resize and padding the kernels are the windows."""
    return kernels.unflatten(1, (axes[0].taps, axes[1].taps))


def _launch(source, weights, bias, out, windows, regions, band, first_row, tile, adjoint) -> None:
    channels, height, width = out.shape[1:]
    tiles = launch.cdiv(band.rows, tile.rows) * launch.cdiv(width, tile.columns)
    _adaptive_conv[(band.images * tiles * launch.cdiv(channels, tile.channels),)](
        map_of(source),
        Folded(weights, *weights.stride()),
        bias,
        map_of(out),
        windows,
        regions,
        channels,
        height,
        width,
        band.image,
        first_row,
        band.row,
        band.rows,
        ADJOINT=adjoint,
        TILE_Y=tile.rows,
        TILE_X=tile.columns,
        BLOCK_C=tile.channels,
        BLOCK_R=tile.cells,
        PRECISION=launch.dot_precision(),
        num_warps=tile.warps,
        maxnreg=tile.registers,
    )
