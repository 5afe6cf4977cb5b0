"""Gradients of gaussian_bilateral_upsample, without atomics: a first pass over the pixels, others over the cells.

The gradient of a weight's logarithm is ``w (<grad, value> - mean)``. The first pass finds the logarithm of every
pixel's total, its mean, and the gradient of the guidance. Then blocks of four by four cells gather from all pixels that
count them: the sums that the gradients of their maps are made of, and the gradients of their values. Where the cells
are few, their pixels are shared out to several programs, whose parts are added up in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.gaussian_bilateral import (
    BLOCK_Q,
    PIXELS,
    SIDE,
    Cells,
    Grids,
    cells_of,
    first_pixel,
    grids_of,
    logs_of,
    pixel_at,
    pixels_of,
    tables_of,
    tones_of,
    window_of,
)
from murf_fast.kernels.launch import bound, map_of
from murf_fast.kernels.products import product

__all__ = ["gaussian_bilateral_upsample_backward"]

ROWS, COLUMNS = tl.constexpr(4), tl.constexpr(4)  # of cells that gather together; BLOCK_Q in all
CHANNELS = 16  # that a program multiplies at a time
# A bound on the registers that is named keeps ptxas from aiming at half of it, where the values' kernel spilled.
OPTIONS = {"num_warps": 8, "maxnreg": 255}
PROGRAMS = 1024  # of a launch that gathers: some for each multiprocessor of any GPU


@triton.jit
def _pointers(map, b, y, x, c):
    """(pixels, channels), of a map of any strides."""
    rows = y.to(tl.int64) * map.stride_y + x.to(tl.int64) * map.stride_x
    return map.data + b.to(tl.int64) * map.stride_b + rows[:, None] + c.to(tl.int64)[None, :] * map.stride_c


@triton.jit
def _of_weights(features, grad, grids, b, pixels, cells, channels, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    """(pixels, cells): products of incoming gradients and values."""
    total = tl.zeros((PIXELS, BLOCK_Q), dtype=tl.float32)
    first = 0
    while first < channels:
        c = first + tl.arange(0, BLOCK_C)
        mask = (c < channels)[None, :]
        own = tl.load(_pointers(grad, b, pixels.y, pixels.x, c), mask=pixels.inside[:, None] & mask, other=0.0)
        value = tl.load(_pointers(features, b, cells.i, cells.j, c), mask=cells.used[:, None] & mask, other=0.0)
        total = product(own, tl.trans(value), total, PRECISION)
        first += BLOCK_C
    return total


@kernel
def _gaussian_statistics(features, grad, grids, tables, statistics, of_guidance, channels, BLOCK_C: tl.constexpr,
                         BLOCK_G: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Of a tile's pixels (B, H, W, 2): logarithm of the total, mean; and the gradient of the guidance, if wanted."""
    x_tiles, y_tiles = tl.cdiv(grids.width, SIDE), tl.cdiv(grids.height, SIDE)
    tile = tl.program_id(0)
    top, left, b = tile // x_tiles % y_tiles * SIDE, tile % x_tiles * SIDE, tile // (x_tiles * y_tiles)
    pixels = pixels_of(grids, tables, b, top, left, grids.height, grids.width)
    first_i, first_j, columns, count = window_of(grids, tables, top, left)
    largest = tl.full((PIXELS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((PIXELS,), dtype=tl.float32)
    mean = tl.zeros((PIXELS,), dtype=tl.float32)
    for step in range(bound(tl.cdiv(count, BLOCK_Q))):
        cells = cells_of(grids, b, first_i, first_j, columns, count, step)
        logs, _, _, _ = logs_of(grids, tables, b, pixels, cells)
        peak = tl.maximum(largest, tl.max(logs, axis=1))
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        weights, before = tl.exp(logs - shift[:, None]), tl.exp(largest - shift)
        products = _of_weights(features, grad, grids, b, pixels, cells, channels, BLOCK_C, PRECISION)
        total = total * before + tl.sum(weights, axis=1)
        mean = mean * before + tl.sum(weights * products, axis=1)
        largest = peak
    mean, lse = mean / total, largest + tl.log(total)
    at = pixel_at(grids, b, pixels.y, pixels.x)
    tl.store(statistics + 2 * at, lse, mask=pixels.inside)
    tl.store(statistics + 2 * at + 1, mean, mask=pixels.inside)
    if of_guidance is not None:
        column = tl.arange(0, BLOCK_G)
        result = tl.zeros((PIXELS, BLOCK_G), dtype=tl.float32)
        for step in range(bound(tl.cdiv(count, BLOCK_Q))):
            cells = cells_of(grids, b, first_i, first_j, columns, count, step)
            logs, _, _, _ = logs_of(grids, tables, b, pixels, cells)
            products = _of_weights(features, grad, grids, b, pixels, cells, channels, BLOCK_C, PRECISION)
            tone = tl.load(tables.cells + cells.at * (5 + grids.guides) + 4)
            slope = tl.exp(logs - lse[:, None]) * (products - mean[:, None]) * (-2.0 * tone)[None, :]
            g = 0
            while g < grids.guides:
                term = tl.sum(slope * tones_of(grids, tables, b, pixels, cells, g), axis=1)
                result += tl.where((column == g)[None, :], term[:, None], 0.0)
                g += 1
        planes = (b.to(tl.int64) * grids.guides + column)[None, :]
        to = of_guidance + pixel_at(grids, planes, pixels.y[:, None], pixels.x[:, None])
        tl.store(to, result, mask=pixels.inside[:, None] & (column < grids.guides)[None, :])


@triton.jit
def _block_of(grids, tables, block):
    """Four by four cells; the image; rows and columns of pixels that may count them, and tiles of those."""
    x_blocks, y_blocks = tl.cdiv(grids.w, COLUMNS), tl.cdiv(grids.h, ROWS)
    first_i, first_j = block // x_blocks % y_blocks * ROWS, block % x_blocks * COLUMNS
    b = block // (x_blocks * y_blocks)
    k = tl.arange(0, BLOCK_Q)
    i, j = first_i + k // COLUMNS, first_j + k % COLUMNS
    used = (i < grids.h) & (j < grids.w)
    i, j = tl.where(used, i, 0), tl.where(used, j, 0)
    top = first_pixel(tables.top, first_i - grids.radius, grids.h)
    bottom = first_pixel(tables.top, first_i + (grids.radius + ROWS), grids.h)
    left = first_pixel(tables.left, first_j - grids.radius, grids.w)
    right = first_pixel(tables.left, first_j + (grids.radius + COLUMNS), grids.w)
    columns = tl.cdiv(right - left, SIDE)
    cells = Cells(i, j, (b.to(tl.int64) * grids.h + i) * grids.w + j, used)
    return cells, b, top, bottom, left, right, columns, tl.cdiv(bottom - top, SIDE) * columns


@triton.jit
def _weights_of(grids, tables, statistics, b, pixels, cells):
    """(pixels, cells): weights, and what :func:`logs_of` gives beside them; the pixels' means."""
    logs, along, across, squares = logs_of(grids, tables, b, pixels, cells)
    at = statistics + 2 * pixel_at(grids, b, pixels.y, pixels.x)
    weights = tl.where(pixels.inside[:, None], tl.exp(logs - tl.load(at)[:, None]), 0.0)
    return weights, along, across, squares, tl.load(at + 1)


@kernel
def _gaussian_to_maps(features, grad, grids, tables, statistics, parts, cells_in_all, shares, channels,
                      BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Sums over the pixels of a share, (shares, B, h, w, 4 + G)."""
    share = tl.program_id(0) % shares
    cells, b, top, bottom, left, right, columns, tiles = _block_of(grids, tables, tl.program_id(0) // shares)
    column = tl.arange(0, BLOCK_G)
    xx, yy, xy, tones = (tl.zeros((BLOCK_Q,), dtype=tl.float32),) * 4
    of_guidance = tl.zeros((BLOCK_Q, BLOCK_G), dtype=tl.float32)
    tile = share + tl.zeros_like(tiles)
    while tile < tiles:
        own_top, own_left = top + tile // columns * SIDE, left + tile % columns * SIDE
        pixels = pixels_of(grids, tables, b, own_top, own_left, bottom, right)
        products = _of_weights(features, grad, grids, b, pixels, cells, channels, BLOCK_C, PRECISION)
        weights, along, across, squares, mean = _weights_of(grids, tables, statistics, b, pixels, cells)
        slope = weights * (products - mean[:, None])
        xx += tl.sum(slope * along * along, axis=0)
        yy += tl.sum(slope * across * across, axis=0)
        xy += tl.sum(slope * along * across, axis=0)
        tones += tl.sum(slope * squares, axis=0)
        g = 0
        while g < grids.guides:
            term = tl.sum(slope * tones_of(grids, tables, b, pixels, cells, g), axis=0)
            of_guidance += tl.where((column == g)[None, :], term[:, None], 0.0)
            g += 1
        tile += shares
    to = parts + (share.to(tl.int64) * cells_in_all + cells.at) * (4 + grids.guides)
    tl.store(to, xx, mask=cells.used)
    tl.store(to + 1, yy, mask=cells.used)
    tl.store(to + 2, xy, mask=cells.used)
    tl.store(to + 3, tones, mask=cells.used)
    used = cells.used[:, None] & (column < grids.guides)[None, :]
    tl.store(to[:, None] + 4 + column[None, :], of_guidance, mask=used)


@kernel
def _gaussian_to_values(grad, grids, tables, statistics, parts, cells_in_all, shares, channels, BLOCK_C: tl.constexpr,
                        PRECISION: tl.constexpr):  # fmt: skip
    """A block of channels of gradients of values, summed over the pixels of a share: (shares, B, h, w, C)."""
    share, rest = tl.program_id(0) % shares, tl.program_id(0) // shares
    c_tiles = tl.cdiv(channels, BLOCK_C)
    c = rest % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    cells, b, top, bottom, left, right, columns, tiles = _block_of(grids, tables, rest // c_tiles)
    total = tl.zeros((BLOCK_Q, BLOCK_C), dtype=tl.float32)
    tile = share + tl.zeros_like(tiles)
    while tile < tiles:
        own_top, own_left = top + tile // columns * SIDE, left + tile % columns * SIDE
        pixels = pixels_of(grids, tables, b, own_top, own_left, bottom, right)
        weights, _, _, _, _ = _weights_of(grids, tables, statistics, b, pixels, cells)
        mask = pixels.inside[:, None] & (c < channels)[None, :]
        own = tl.load(_pointers(grad, b, pixels.y, pixels.x, c), mask=mask, other=0.0)
        total = product(tl.trans(weights), own, total, PRECISION)
        tile += shares
    to = parts + ((share.to(tl.int64) * cells_in_all + cells.at) * channels)[:, None] + c[None, :]
    tl.store(to, total, mask=cells.used[:, None] & (c < channels)[None, :])


def gaussian_bilateral_upsample_backward(
    grad: Tensor,
    features: Tensor,
    guidance: Tensor,
    cells: Tensor,
    radii: Tensor | None,
    radius: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the features and of the guidance, and the sums (B, h, w, 4 + G) that those of the cells' maps are
    made of; all float32, None where not wanted.
    """
    (batch, channels, height, width), (_, h, w, terms) = grad.shape, cells.shape
    grids, tables = grids_of(guidance, cells, radius), tables_of(guidance, cells, radii, radius)
    block_g, precision = launch.power_of_two(grids.guides), launch.dot_precision()
    maps = map_of(features), map_of(grad)
    statistics = cells.new_empty(batch, height, width, 2)
    of_guidance = torch.empty_like(tables.guidance) if wanted[1] else None
    # A product has 16 columns at least.
    block_c = min(max(launch.power_of_two(channels), 16), CHANNELS)
    count = batch * h * w
    with launch.on_device_of(grad):
        tiles = batch * launch.cdiv(height, SIDE.value) * launch.cdiv(width, SIDE.value)
        _gaussian_statistics[(tiles,)](
            *maps, grids, tables, statistics, of_guidance, channels, BLOCK_C=block_c, BLOCK_G=block_g,
            PRECISION=precision, **OPTIONS
        )  # fmt: skip
        sums = of_values = None
        if wanted[2]:
            shares = _shares(grids, batch, 1, height * width * channels)
            parts = cells.new_empty(shares, batch, h, w, terms - 1)
            _gaussian_to_maps[(_blocks(grids, batch) * shares,)](
                *maps, grids, tables, statistics, parts, count, shares, channels, BLOCK_C=block_c, BLOCK_G=block_g,
                PRECISION=precision, **OPTIONS
            )  # fmt: skip
            sums = parts.sum(0)
        if wanted[0]:
            wide = min(max(launch.power_of_two(channels), 16), 128)
            c_tiles = launch.cdiv(channels, wide)
            shares = _shares(grids, batch, c_tiles, height * width)
            parts = cells.new_empty(shares, batch, h, w, channels)
            _gaussian_to_values[(_blocks(grids, batch) * c_tiles * shares,)](
                maps[1], grids, tables, statistics, parts, count, shares, channels, BLOCK_C=wide, PRECISION=precision,
                **OPTIONS
            )  # fmt: skip
            of_values = parts.sum(0).permute(0, 3, 1, 2)
    return of_values, of_guidance, sums


def _blocks(grids: Grids, batch: int) -> int:
    return batch * launch.cdiv(grids.h, ROWS.value) * launch.cdiv(grids.w, COLUMNS.value)


def _shares(grids: Grids, batch: int, c_tiles: int, most: int) -> int:
    """Programs that share the pixels of a block of cells: as many as fill a GPU, while each has a tile of pixels and
    their parts hold no more than the result, ``most`` numbers for each that a cell has.
    """
    wanted = launch.cdiv(PROGRAMS, _blocks(grids, batch) * c_tiles)
    tiles = launch.cdiv(grids.height, SIDE.value) * launch.cdiv(grids.width, SIDE.value)
    return max(1, min(wanted, tiles, most // (grids.h * grids.w)))
