"""NAF's queries of a rectangle: what needs the whole image first, the norms and the keys, then the rectangle alone.

Every 3x3 layer reads a pixel beyond its result, so that a rectangle is encoded with a border of as many pixels as there
are such layers, rounded up to tiles (:func:`murf_fast.ops._pixel_conv.columns_read`): then it is a crop of the whole on
the CPU, bit for bit. Keys are averages of all queries, which the pass over the image makes and does not keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from murf_fast.ops import _contract
from murf_fast.ops._image_encoders import requires_region, rows_of_a_band
from murf_fast.ops._image_regions import add_pooled, walk
from murf_fast.ops._library import LAUNCHED, axes_of, empty_map, register
from murf_fast.ops._naf_encoder import BLOCK, Encoder, encode, finish_pointwise, networks, requires, rotation_of
from murf_fast.ops._pixel_conv import columns_read, pixel_conv
from murf_fast.ops._pixel_linear import pixel_linear
from murf_fast.ops._pixels import as_map, in_arithmetic_of, normalized, pairs, pixels_of
from murf_fast.tables.moments import join
from murf_fast.tables.resize import part

Span = tuple[int, int]
Norms = Sequence[tuple[Tensor, Tensor]]


def naf_statistics(
    image: Tensor,
    encoders: tuple[Sequence[Tensor], Sequence[Tensor]],
    turns: tuple[Tensor, Tensor],
    num_heads: int,
    grids: Sequence[Sequence[int]],
    recompute: bool,
    backend: str,
) -> list[Tensor]:
    """Norms (B, n, 2, D / 2) in float32, gain and offset of those of the 1x1, then of the 3x3 encoder, and keys
    (B, D, *grid) for every grid. The arguments are those of :func:`murf_fast.ops._naf_encoder.naf_queries`.

    Args:
        recompute: In bands of rows, from the image on for every norm.
    """
    parameters, flat_grids = [*encoders[0], *encoders[1]], [n for grid in grids for n in grid]
    return _statistics(image, parameters, *turns, num_heads, flat_grids, recompute, backend)


def naf_rectangle(
    image: Tensor,
    norms: Tensor,
    encoders: tuple[Sequence[Tensor], Sequence[Tensor]],
    turns: tuple[Tensor, Tensor],
    num_heads: int,
    region: Sequence[int],
    backend: str,
) -> Tensor:
    """Queries (B, D, height, width) of ``region``, (top, left, height, width) of the output."""
    return _rectangle(image, norms, [*encoders[0], *encoders[1]], *turns, num_heads, list(region), backend)


def _statistics_requires(op, image, parameters, rows, columns, num_heads, grids, recompute, backend) -> None:
    requires(op, image, parameters, rows, columns, num_heads, grids, backend)


def _count(parameters: Sequence[Tensor]) -> int:
    """Norms of both encoders."""
    return 2 * (len(parameters) - 4) // len(BLOCK)


def _statistics_empty(image, parameters, rows, columns, num_heads, grids, recompute, backend) -> list[Tensor]:
    half, batch = parameters[1].shape[0], image.shape[0]
    norms = image.new_empty((batch, _count(parameters), 2, half), dtype=torch.float32)
    return [norms, *(empty_map(image, (batch, 2 * half, *grid), True) for grid in pairs(grids))]


def _statistics_launch(image, parameters, rows, columns, num_heads, grids, recompute, backend, results) -> None:
    norms, *keys = results
    with in_arithmetic_of(backend, image, keys) as (image, maps):
        net = _Network(image, parameters, rows, columns, num_heads, backend)
        for i, x in enumerate(image):
            found = (_in_bands if recompute else _in_maps)(net, x, [m[i] for m in maps])
            norms[i].copy_(torch.stack([torch.stack(norm) for norm in found]))


class _Network:
    """What the layers of a call need."""

    def __init__(self, image: Tensor, parameters, rows, columns, num_heads: int, backend: str) -> None:
        self.encoders = networks(parameters, image.dtype, backend)
        self.rotation, self.heads = rotation_of(rows, columns, num_heads), num_heads
        self.inner, self.size = tuple(image.shape[2:]), (len(rows), len(columns))
        self.half, self.backend = len(parameters[1]), backend
        self.axes = axes_of(*self.inner, self.size, "area", False)

    def rows_of_a_band(self, image: Tensor, size) -> int:
        """Of a map of this size, whose every row is one of the encoders' at least."""
        rows = rows_of_a_band(image.new_empty((0, self.half)), (0, max(size[1], self.inner[1])))
        return min(size[0], max(2, rows * size[0] // max(self.inner[0], size[0]) // 2 * 2))


def _in_maps(net: _Network, image: Tensor, keys: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """All norms; fills ``keys``, (D, h, w) each, from queries in a map of their own."""
    queries = image.new_empty((net.size[0] * net.size[1], 2 * net.half))
    found: list[tuple[Tensor, Tensor]] = []
    encode(image, net.encoders, net.rotation, net.size, net.heads, net.backend, queries, keys, found)
    return found


def _in_bands(net: _Network, image: Tensor, keys: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The same, over bands of rows."""
    (height, width), columns, found = net.inner, (0, net.inner[1]), []
    rows = net.rows_of_a_band(image, net.inner)
    for layers, encoder in zip((_pointwise, _wide), net.encoders, strict=True):
        norms: list[tuple[Tensor, Tensor]] = []
        for half in encoder.halves:
            parts = [layers(image, encoder, norms, band, columns, net.backend)[1] for band in _bands(height, rows)]
            statistics = join(torch.stack([torch.stack(p) for p in parts]), rows * width, height * width)
            norms.append(normalized(statistics, half, height * width, net.backend)[:2])
        found += norms
    if keys:
        rows = net.rows_of_a_band(image, net.size)
        for key in keys:
            key.zero_()
        for begin, end in _bands(net.size[0], rows):
            queries = as_map(_queries(net, image, found, (begin, end), (0, net.size[1])), (end - begin, net.size[1]))
            for key in keys:
                add_pooled(queries, begin, net.size[0], key, net.backend)
    return found


def _bands(height: int, rows: int) -> Iterator[Span]:
    for begin in range(0, height, rows):
        yield begin, min(begin + rows, height)


def _pointwise(image, encoder: Encoder, norms: Norms, rows: Span, columns: Span, backend):
    """Pixels of a rectangle behind as many of the 1x1 encoder's layers as there are norms and one more, with the
    statistics of the last.
    """
    x = pixels_of(image[:, slice(*rows), slice(*columns)])
    out = x.new_empty((len(x), encoder.bias.shape[0]))
    options = {"backend": backend, "statistics": True}
    statistics = pixel_linear(x, out, weight=encoder.first, bias=encoder.bias, **options)
    for norm, half in zip(norms, encoder.halves, strict=False):
        statistics = pixel_linear(out, out, norm=norm, weight=half.weight, bias=half.bias, **options)
    return out, statistics


def _wide(image, encoder: Encoder, norms: Norms, rows: Span, columns: Span, backend):
    """The same of the 3x3 encoder. The statistics are those of rows from an even one on, over all columns.

    Layers are made of the columns that the first one reads; those near a border within the map go wrong by a tile for
    every two layers, and the rectangle is what is right in the end.
    """
    height, width = image.shape[1:]
    tops, (left, right) = [(rows[0] - rows[0] % 2, rows[1])], columns
    for _ in range(1 + len(norms)):
        top, bottom = max(tops[-1][0] - 1, 0), min(tops[-1][1] + 1, height)
        tops.append((top - top % 2, bottom))
        left, right = columns_read(left, right, width)
    (top, bottom), wider = tops.pop(), right - left
    x = pixels_of(image[:, top:bottom, left:right])
    layers: list[tuple[Any, ...]] = [(None, encoder.first, encoder.bias)]
    layers += [(norm, half.weight, half.bias) for norm, half in zip(norms, encoder.halves, strict=False)]
    buffers = [x.new_empty(((bottom - top) * wider, encoder.bias.shape[0])) for _ in range(min(2, len(layers)))]
    options, statistics = {"reflect": True, "statistics": True, "backend": backend}, None
    for i, (norm, weight, bias) in enumerate(layers):
        begin, end = tops.pop()
        out = buffers[i % 2][: (end - begin) * wider]
        within, size = (begin - top, end - top), (bottom - top, wider)
        statistics = pixel_conv(x, size, out, norm=norm, weight=weight, bias=bias, rows=within, **options)
        x, top, bottom = out, begin, end
    if (top, left, right) == (rows[0], *columns):
        return x, statistics
    inside = x.view(bottom - top, wider, -1)[rows[0] - top :, columns[0] - left : columns[1] - left]
    return inside.flatten(0, 1), statistics


def _queries(net: _Network, image: Tensor, norms: Norms, rows: Span, columns: Span) -> Tensor:
    """Turned queries (pixels, D) of a rectangle of the output."""
    (from_y, of_rows), (from_x, of_columns) = (part(a, *s) for a, s in zip(net.axes, (rows, columns), strict=True))
    size = (of_rows.in_size, of_columns.in_size)
    source = (from_y, from_y + size[0]), (from_x, from_x + size[1])
    count, (pointwise, wide), same = len(norms) // 2, net.encoders, net.inner == net.size
    result = image.new_empty(((rows[1] - rows[0]) * (columns[1] - columns[0]), 2 * net.half))

    def pooled(x: Tensor) -> Tensor:
        return x if same else pixels_of(walk(as_map(x, size)[None], (of_rows, of_columns), net.backend)[0])

    *known, last = norms[:count]
    x, _ = _pointwise(image, pointwise, known, *source, net.backend)
    last = pointwise.halves[-1]._replace(gain=last[0], offset=last[1])
    fewer = net.size[0] * net.size[1] < net.inner[0] * net.inner[1]
    finish_pointwise(x, last, pooled, same, fewer, result[:, : net.half], net.backend)
    x, _ = _wide(image, wide, norms[count:], *source, net.backend)
    result[:, net.half :] = pooled(x)
    turned = (net.rotation[0][slice(*rows)], net.rotation[1][slice(*columns)])
    pixel_linear(result, result, rotation=turned, heads=net.heads, backend=net.backend)
    return result


def _rectangle_requires(op, image, norms, parameters, rows, columns, num_heads, region, backend) -> None:
    requires(op, image, parameters, rows, columns, num_heads, [], backend)
    shape = (image.shape[0], _count(parameters), 2, len(parameters[1]))
    _contract.tensor(op, "norms", norms, image, shape, (torch.float32,))
    requires_region(op, (len(rows), len(columns)), region)


def _rectangle_empty(image, norms, parameters, rows, columns, num_heads, region, backend) -> Tensor:
    return empty_map(image, (image.shape[0], 2 * parameters[1].shape[0], *region[2:]), True)


def _rectangle_launch(image, norms, parameters, rows, columns, num_heads, region, backend, result) -> None:
    top, left, height, width = region
    with in_arithmetic_of(backend, image, [result]) as (image, [queries]):
        net = _Network(image, parameters, rows, columns, num_heads, backend)
        for x, n, o in zip(image, norms, queries, strict=True):
            known = [norm.unbind(0) for norm in n.unbind(0)]
            # A single pixel has no layout: it would be averaged in the order of planar maps.
            first = max(min(left, net.size[1] - 2), 0) if height * width == 1 else left
            columns = first, max(left + width, min(first + 2, net.size[1]))
            made = _queries(net, x, known, (top, top + height), columns).view(height, columns[1] - first, -1)
            pixels_of(o).copy_(made[:, left - first : left - first + width].flatten(0, 1))


_statistics = register(
    "naf_statistics(Tensor image, Tensor[] parameters, Tensor rows, Tensor columns, int num_heads, SymInt[] grids, "
    "bool recompute, str backend) -> Tensor[]",
    _statistics_requires,
    _statistics_empty,
    _statistics_launch,
    reference=LAUNCHED,
)
_rectangle = register(
    "naf_rectangle(Tensor image, Tensor norms, Tensor[] parameters, Tensor rows, Tensor columns, int num_heads, "
    "SymInt[] region, str backend) -> Tensor",
    _rectangle_requires,
    _rectangle_empty,
    _rectangle_launch,
    reference=LAUNCHED,
)
