"""Weights of a tile of pixels for some cells, as the kernels of gaussian_bilateral_upsample form them.

A tile is eight by eight pixels. It meets the cells that any of its pixels counts, row by row and BLOCK_Q at a time; how
often a pixel counts a cell is a logarithm that the weight's gets, -inf outside the pixel's own window.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from murf_fast.tables.disk import cells_of_axis, disk_counts

SIDE = tl.constexpr(8)
PIXELS = tl.constexpr(64)
BLOCK_Q = tl.constexpr(16)


class Grids(NamedTuple):
    """Sizes of the result and of the cells; channels of the guidance; cells of the largest window."""

    height: int
    width: int
    h: int
    w: int
    guides: int
    radius: int


class Tables(NamedTuple):
    """Float32 guidance (B, G, H, W), cells (B, h, w, 5 + G), radii (B, 1, H, W) or None, the counts of
    :mod:`murf_fast.tables.disk`; all dense. And both axes' tables of cells.
    """

    guidance: Tensor
    cells: Tensor
    radii: Tensor | None
    counts: Tensor
    row: Tensor
    dy: Tensor
    top: Tensor
    column: Tensor
    dx: Tensor
    left: Tensor


class Pixels(NamedTuple):
    """Of every pixel: its place, whether it exists, its cell, its distance to that cell, its window."""

    y: Tensor
    x: Tensor
    inside: Tensor
    row: Tensor
    column: Tensor
    dy: Tensor
    dx: Tensor
    radius: Tensor


class Cells(NamedTuple):
    """Row, column and place in the table of cells, and whether there is one."""

    i: Tensor
    j: Tensor
    at: Tensor
    used: Tensor


def grids_of(guidance: Tensor, cells: Tensor, radius: int) -> Grids:
    _, guides, height, width = guidance.shape
    return Grids(height, width, cells.shape[1], cells.shape[2], guides, radius)


def tables_of(guidance: Tensor, cells: Tensor, radii: Tensor | None, radius: int) -> Tables:
    (_, h, w, _), (_, _, height, width), device = cells.shape, guidance.shape, cells.device
    axes = (*cells_of_axis(height, h, device), *cells_of_axis(width, w, device))
    return Tables(guidance.contiguous(), cells, radii, disk_counts(radius, device), *axes)


@triton.jit
def first_pixel(first, cell, cells):
    """The first pixel of an axis that lies in ``cell`` or beyond, by its table."""
    return tl.load(first + tl.minimum(tl.maximum(cell, 0), cells))


@triton.jit
def pixel_at(grids, b, y, x):
    """Place of a pixel in a map of one channel (B, 1, H, W)."""
    return (b.to(tl.int64) * grids.height + y) * grids.width + x


@triton.jit
def pixels_of(grids, tables, b, top, left, bottom, right):
    """Eight by eight pixels from (top, left) on, those before (bottom, right); others are the last one's twins."""
    k = tl.arange(0, PIXELS)
    y, x = top + k // SIDE, left + k % SIDE
    inside = (y < bottom) & (x < right)
    y, x = tl.minimum(y, grids.height - 1).to(tl.int32), tl.minimum(x, grids.width - 1).to(tl.int32)
    row, column = tl.load(tables.row + y), tl.load(tables.column + x)
    dy, dx = tl.load(tables.dy + y), tl.load(tables.dx + x)
    radius = tl.full((PIXELS,), 0, dtype=tl.int32) + grids.radius
    if tables.radii is not None:
        own = tl.load(tables.radii + pixel_at(grids, b, y, x)).to(tl.int32)
        radius = tl.minimum(tl.maximum(own, 1), radius)
    return Pixels(y, x, inside, row, column, dy, dx, radius)


@triton.jit
def window_of(grids, tables, top, left):
    """Cells that a tile of the result counts: first row and column, columns, cells."""
    bottom, right = tl.minimum(top + (SIDE - 1), grids.height - 1), tl.minimum(left + (SIDE - 1), grids.width - 1)
    i = tl.maximum(tl.load(tables.row + top) - grids.radius, 0)
    j = tl.maximum(tl.load(tables.column + left) - grids.radius, 0)
    rows = tl.minimum(tl.load(tables.row + bottom) + grids.radius, grids.h - 1) - i + 1
    columns = tl.minimum(tl.load(tables.column + right) + grids.radius, grids.w - 1) - j + 1
    return i, j, columns, rows * columns


@triton.jit
def cells_of(grids, b, first_i, first_j, columns, count, step):
    """BLOCK_Q cells of a tile's window."""
    k = step * BLOCK_Q + tl.arange(0, BLOCK_Q)
    used = k < count
    i, j = tl.where(used, first_i + k // columns, 0), tl.where(used, first_j + k % columns, 0)
    return Cells(i, j, (b.to(tl.int64) * grids.h + i) * grids.w + j, used)


@triton.jit
def tones_of(grids, tables, b, pixels, cells, g):
    """(pixels, cells): difference in channel ``g`` of the guidance."""
    own = tl.load(tables.guidance + pixel_at(grids, b.to(tl.int64) * grids.guides + g, pixels.y, pixels.x))
    other = tl.load(tables.cells + cells.at * (5 + grids.guides) + 5 + g)
    return own[:, None] - other[None, :]


@triton.jit
def _kind(i, n):
    """Of a border that a cell stands for: none, one, both."""
    border = ((i == 0) | (i == n - 1)).to(tl.int32)
    return border + (border & (n == 1))


@triton.jit
def logs_of(grids, tables, b, pixels, cells):
    """(pixels, cells): logarithms of weights, the two numbers of a distance, squared differences in guidance."""
    far_y, far_x = cells.i[None, :] - pixels.row[:, None], cells.j[None, :] - pixels.column[:, None]
    dy = pixels.dy[:, None] - far_y.to(tl.float32) * (grids.height / grids.h)
    dx = pixels.dx[:, None] - far_x.to(tl.float32) * (grids.width / grids.w)
    own = tables.cells + cells.at * (5 + grids.guides)
    along = tl.load(own)[None, :] * dx + tl.load(own + 1)[None, :] * dy
    across = tl.load(own + 2)[None, :] * dx + tl.load(own + 3)[None, :] * dy
    squares = tl.zeros((PIXELS, BLOCK_Q), dtype=tl.float32)
    g = 0
    while g < grids.guides:
        difference = tones_of(grids, tables, b, pixels, cells, g)
        squares += difference * difference
        g += 1
    far_y, far_x = tl.abs(far_y), tl.abs(far_x)
    near = cells.used[None, :] & (far_y <= grids.radius) & (far_x <= grids.radius)
    kinds = (3 * _kind(cells.i, grids.h) + _kind(cells.j, grids.w))[None, :]
    n = grids.radius + 1
    place = ((kinds * n + pixels.radius[:, None]) * n + far_y) * n + far_x
    count = tl.load(tables.counts + place, mask=near, other=float("-inf"))
    logs = count - (along * along + across * across + tl.load(own + 4)[None, :] * squares)
    return logs, along, across, squares
