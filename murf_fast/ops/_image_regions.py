"""AnyUp's and JAFAR's queries of a rectangle: what needs the whole image first, the norms and the keys, then the
rectangle alone.

The norms of the three encoders are statistics of the whole image, each of what the norms before it leave; JAFAR has one
more, of the encoded queries on the output's grid. Either all
layers run over maps of the image's size, as for the whole (:mod:`murf_fast.ops._image_encoders`), or, one norm after
the other, over bands of rows, which are computed from the image again each time: four times the layers, in three to
four times the time as bands stay in a cache, and nothing of the image's size.

With the norms of the former a rectangle of the queries is a crop of the whole on the CPU, bit for bit: every layer is a
sum of its own for every pixel, and the convolution's tiles are cut where the whole is (:class:`Band`). Not so with the
norms of bands, whose sums are joined in another order, nor on a GPU, where the products are cuDNN's: there they agree
within the error of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from murf_fast import backends
from murf_fast.ops import _contract
from murf_fast.ops._image_encoders import (
    Encoder,
    Network,
    bands_of,
    empty_maps,
    encode,
    finish_pooled,
    finish_queries,
    network,
    project,
    reach,
    requires_network,
    requires_region,
    rotation_of,
    rows_of_a_band,
)
from murf_fast.ops._library import LAUNCHED, axes_of, register
from murf_fast.ops._pixel_conv import columns_read, pixel_conv
from murf_fast.ops._pixel_linear import pixel_linear
from murf_fast.ops._pixels import as_map, in_arithmetic_of, norm_of, normalized, pairs, pixels_of, requires_grids
from murf_fast.tables.moments import join
from murf_fast.tables.resize import part

NORMS = 4  # of an encoder


def image_statistics(
    image: Tensor,
    parameters: Sequence[Tensor],
    size: Sequence[int],
    grids: Sequence[Sequence[int]],
    recompute: bool,
    backend: str,
    *,
    normalize: bool = False,
) -> list[Tensor]:
    """Norms (B, 12, 2, C) in float32, a gain and an offset for each of image, key and query encoder, and the encoded
    keys (B, C, *grid) for every grid. With ``normalize`` there are 13, the last that of the queries.

    Args:
        image: (B, 3, H, W).
        parameters: Those of :func:`murf_fast.ops._image_encoders.flat`.
        size: (height, width) of the output; of it is the norm of the queries, and nothing else.
        recompute: In bands of rows, from the image on for every norm.
        normalize: As for :func:`murf_fast.ops._image_encoders.image_queries`.
    """
    flat_grids = [n for grid in grids for n in grid]
    return _statistics(image, list(parameters), list(size), flat_grids, normalize, recompute, backend)


def image_rectangle(
    image: Tensor,
    norms: Tensor,
    parameters: Sequence[Tensor],
    size: Sequence[int],
    region: Sequence[int],
    backend: str,
    *,
    normalize: bool = False,
) -> Tensor:
    """Projected queries (B, C, height, width) of ``region``, (top, left, height, width) of the output of ``size``."""
    return _rectangle(image, norms, list(parameters), list(size), list(region), normalize, backend)


def _statistics_requires(op, image, parameters, size, grids, normalize, recompute, backend) -> None:
    requires_network(op, image, parameters, backend)
    _contract.grid(op, "size", size)
    requires_grids(op, grids)


def _statistics_empty(image, parameters, size, grids, normalize, recompute, backend) -> list[Tensor]:
    shape = (image.shape[0], 3 * NORMS + normalize, 2, parameters[-1].shape[0])
    return [image.new_empty(shape, dtype=torch.float32), *empty_maps(image, parameters, pairs(grids))]


def _statistics_launch(image, parameters, size, grids, normalize, recompute, backend, results) -> None:
    norms, *keys = results
    with in_arithmetic_of(backend, image, keys) as (image, maps):
        net = network(parameters, image.dtype, backend)
        for i, x in enumerate(image):
            make = _in_bands if recompute else _in_maps
            found = make(x, net, [m[i] for m in maps], tuple(size) if normalize else None, backend)
            norms[i].copy_(torch.stack([torch.stack(norm) for norm in found]))


def _in_maps(image: Tensor, net: Network, keys: Sequence[Tensor], output, backend: str) -> list[tuple[Tensor, Tensor]]:
    """All norms, over three maps of the image's size; fills ``keys``, (C, h, w) each. Of the queries, too, on an output
    of this size, if it is not None.
    """
    size = tuple(image.shape[1:])
    found: list[Any] = []
    one, two, three = (image.new_empty((size[0] * size[1], len(net.bias))) for _ in range(3))
    to_image, to_keys, to_queries = net.encoders
    mixed = encode(pixels_of(image), to_image, one, two, backend, size, rotation_of(net, size), found=found)
    last = encode(mixed, to_keys, three, two, backend, stop=True, found=found)
    finish_pooled(three, two, last, size, keys, backend)
    last = encode(mixed, to_queries, one, two, backend, stop=True, found=found)
    if output is not None:
        found.append(finish_queries(one, two, last, size, output, True, backend)[1])
    return found


def _in_bands(image: Tensor, net: Network, keys: Sequence[Tensor], output, backend: str) -> list[tuple[Tensor, Tensor]]:
    """The same, over bands of rows."""
    height, width = image.shape[1:]
    angles, of_columns = rotation_of(net, (height, width))
    rows = min(height, rows_of_a_band(net.bias[None].to(image.dtype), (0, width)))
    buffers = [image.new_empty((rows * width, len(net.bias))) for _ in range(3)]
    found: list[list[Any]] = [[], [], []]

    def bands() -> Iterator[tuple[int, int, tuple[Tensor, Tensor, Tensor]]]:
        """First row, end, and the buffers; the first holds the encoded image once all of its norms are known."""
        for begin in range(0, height, rows):
            end = min(begin + rows, height)
            one, two, three = (b[: (end - begin) * width] for b in buffers)
            yield begin, end, (one, two, three)

    def encoded(begin: int, end: int, own: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        rotation, patch = (angles[begin:end], of_columns), Patch(image, (begin, end), (0, width))
        return _layers(patch, net.encoders[0], found[0], own[0], own[1], backend, rotation)

    for _ in range(NORMS):
        of_image = [encoded(*band) for band in bands()]
        found[0].append(_joined(of_image, net.encoders[0], len(found[0]), rows * width, height * width, backend))
    for _ in range(NORMS):
        parts: tuple[list[Any], list[Any]] = ([], [])
        for begin, end, own in bands():
            encoded(begin, end, own)
            for i in (1, 2):
                parts[i - 1].append(_layers(own[0], net.encoders[i], found[i], own[1], own[2], backend))
        for i in (1, 2):
            found[i].append(
                _joined(parts[i - 1], net.encoders[i], len(found[i]), rows * width, height * width, backend)
            )
    if keys:
        totals = [(torch.zeros_like(pixels_of(k)), torch.zeros_like(pixels_of(k))) for k in keys]
        for begin, end, own in bands():
            encoded(begin, end, own)
            _layers(own[0], net.encoders[1], found[1][:3], own[1], own[2], backend)
            pixel_linear(own[2], own[2], norm=found[1][3], backend=backend)
            for key, total in zip(keys, totals, strict=True):
                for x, sums in zip(own[1:], total, strict=True):
                    add_pooled(as_map(x, (end - begin, width)), begin, height, as_map(sums, key.shape[1:]), backend)
        weight = net.encoders[1].blocks[-1][-1].weight
        for key, (residual, x) in zip(keys, totals, strict=True):
            pixel_linear(x, pixels_of(key), weight=weight, residual=residual, backend=backend)
    norms: list[Any] = [norm for one in found for norm in one]
    if output is not None:
        norms.append(_of_queries(image, norms, net, output, backend))
    return norms


def _of_queries(image: Tensor, norms: Sequence[Any], net: Network, output, backend: str) -> tuple[Tensor, Tensor]:
    """The norm of the queries, over bands of rows of the output."""
    (height, width), parts = output, []
    rows = min(height, _rows_of_a_band(net, image, output, (0, width)))
    bands = [(y, min(y + rows, height)) for y in range(0, height, rows)]
    for x in _encoded(image, norms, net, output, bands, (0, width), backend):
        parts.append(torch.stack(pixel_linear(x, x, statistics=True, backend=backend)))
    total = height * width
    return norm_of(join(torch.stack(parts), rows * width, total), None, None, total, backend)


class Patch(NamedTuple):
    """A rectangle of an image (C, H, W), where a first layer may read what is around it."""

    image: Tensor
    rows: tuple[int, int]  # begin and end
    columns: tuple[int, int]


def _first(x: Patch | Tensor, encoder: Encoder, out: Tensor, backend: str, statistics: bool):
    """The first layer of a patch, or of pixels. The tiles of a 3x3 convolution begin where they do in the whole image;
    there are statistics of it from an even row on and over all columns.
    """
    if not encoder.is_wide:
        if isinstance(x, Patch):
            x = pixels_of(x.image[:, slice(*x.rows), slice(*x.columns)])
        return pixel_linear(x, out, weight=encoder.first, statistics=statistics, backend=backend)
    image, (top, bottom), (left, right) = x
    height, width = image.shape[1:]
    begin, (from_x, to_x) = top - top % 2, columns_read(left, right, width)
    from_y, to_y = max(begin - 1, 0), min(bottom + 1, height)
    columns, whole = to_x - from_x, (begin, from_x, to_x) == (top, left, right)
    made = out if whole else out.new_empty(((bottom - begin) * columns, out.shape[1]))
    found = pixel_conv(
        pixels_of(image[:, from_y:to_y, from_x:to_x]),
        (to_y - from_y, columns),
        made,
        weight=encoder.first,
        reflect=True,
        rows=(begin - from_y, bottom - from_y),
        statistics=statistics,
        backend=backend,
    )
    if not whole:
        inside = made.view(bottom - begin, columns, -1)[top - begin :, left - from_x : right - from_x]
        out.view(inside.shape).copy_(inside)
    return found


def _layers(
    x: Patch | Tensor,
    encoder: Encoder,
    norms: Sequence[tuple[Tensor, Tensor]],
    main: Tensor,
    spare: Tensor,
    backend: str,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Runs an encoder up to the first norm that is not among ``norms``, and returns its statistics; with all four, to
    its result in ``main``. What three leave is in ``spare``, the residual in ``main``.
    """
    known = len(norms)
    statistics = _first(x, encoder, main, backend, known == 0)
    for i in range(known):
        layer = encoder.blocks[i // 2][i % 2]
        options: dict[str, Any] = {
            "norm": norms[i],
            "weight": layer.weight,
            "statistics": i + 1 == known < NORMS,
            "backend": backend,
        }
        if i % 2 == 0:
            statistics = pixel_linear(main, spare, **options)
        else:
            rotate = rotation if i + 1 == NORMS else None
            statistics = pixel_linear(spare, main, residual=main, rotation=rotate, **options)
    return statistics


def _joined(parts: list[Any], encoder: Encoder, at: int, size: int, total: int, backend: str) -> tuple[Tensor, Tensor]:
    """Norm number ``at`` of an encoder, from the statistics of bands of ``size`` pixels (the last of what is left)."""
    statistics = join(torch.stack([torch.stack(p) for p in parts]), size, total)
    return normalized(statistics, encoder.blocks[at // 2][at % 2], total, backend)[:2]


def add_pooled(band: Tensor, begin: int, height: int, sums: Tensor, backend: str) -> None:
    """Adds to averages (C, h, w) of a map of ``height`` rows the share of those from ``begin`` on."""
    (_, rows, width), grid = band.shape, sums.shape[1:]
    of_rows, of_columns = axes_of(height, width, tuple(grid), "area", False)
    reads = (of_rows.first < begin + rows) & (of_rows.first + of_rows.count > begin)
    low, high = int(reads.argmax()), len(reads) - int(reads[::-1].argmax())
    shares = torch.zeros((high - low, rows), dtype=band.dtype, device="cpu")
    for cell in range(low, high):
        first = int(of_rows.first[cell]) - begin
        weights = torch.from_numpy(of_rows.weights[cell, : of_rows.count[cell]])
        skip = max(0, -first)
        weights = weights[skip : rows - first]
        shares[cell - low, first + skip : first + skip + len(weights)] = weights.to(band.dtype)
    averaged = walk(band[None], (axes_of(rows, rows, (rows, rows), "area", False)[0], of_columns), backend)[0]
    sums[:, low:high] += torch.einsum("ij,cjw->ciw", shares.to(band.device), averaged)


def walk(x: Tensor, axes, backend: str) -> Tensor:
    """A map (1, C, H, W), channels_last, through two tables."""
    size = tuple(a.out_size for a in axes)
    out = torch.empty((1, x.shape[1], *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    backends.launcher(backend).upsample_sum([x], [axes], None, out)
    return out


def _rectangle_requires(op, image, norms, parameters, size, region, normalize, backend) -> None:
    requires_network(op, image, parameters, backend)
    shape = (image.shape[0], 3 * NORMS + normalize, 2, len(parameters[-1]))
    _contract.tensor(op, "norms", norms, image, shape, (torch.float32,))
    requires_region(op, size, region)


def _rectangle_empty(image, norms, parameters, size, region, normalize, backend) -> Tensor:
    return empty_maps(image, parameters, [region[2:]])[0]


def _rectangle_launch(image, norms, parameters, size, region, normalize, backend, result) -> None:
    with in_arithmetic_of(backend, image, [result]) as (image, [queries]):
        net = network(parameters, image.dtype, backend)
        for x, n, o in zip(image, norms, queries, strict=True):
            _rectangle_of(x, [norm.unbind(0) for norm in n.unbind(0)], net, tuple(size), region, o, backend)


def _rectangle_of(image, norms, net: Network, size, region, out: Tensor, backend) -> None:
    columns = reach(region, size)
    bands = list(bands_of(size, region, _rows_of_a_band(net, image, size, columns)))
    of_queries = norms[3 * NORMS] if len(norms) > 3 * NORMS else None
    sources = _encoded(image, norms, net, size, [band.source[0] for band in bands], columns, backend)
    for band, x in zip(bands, sources, strict=True):
        project(x, band, of_queries, net, out, backend)


def _rows_of_a_band(net: Network, image: Tensor, size, columns) -> int:
    """Rows of an output of this size, in these columns, for which a band of the image, or of the output, is encoded."""
    height, width = image.shape[1:]
    from_x, of_columns = part(axes_of(height, width, size, "area", False)[1], *columns)
    wider = max(columns, (from_x, from_x + of_columns.in_size), key=lambda ends: ends[1] - ends[0])
    rows = rows_of_a_band(net.bias[None].to(image.dtype), wider)
    return max(2, rows * size[0] // max(height, size[0]) // 2 * 2)


def _encoded(image, norms, net: Network, size, bands, columns, backend) -> Iterator[Tensor]:
    """Encoded queries (pixels, C) of an output of ``size``: of every band of its rows, in these columns. They lie where
    those of the next band will.
    """
    image_size, channels = tuple(image.shape[1:]), len(net.bias)
    rotation = rotation_of(net, image_size)
    axes = axes_of(*image_size, size, "area", False)
    same = size == image_size
    fewer = size[0] * size[1] < image_size[0] * image_size[1]
    from_x, of_columns = part(axes[1], *columns)
    to_x = from_x + of_columns.in_size
    buffers: list[Tensor] = []
    for rows in bands:
        from_y, of_rows = part(axes[0], *rows)
        to_y = from_y + of_rows.in_size
        source = (to_y - from_y, to_x - from_x)
        count = source[0] * source[1]
        if not buffers or len(buffers[0]) < count:
            buffers = [image.new_empty((count, channels)) for _ in range(3)]
        mixed, main, spare = (b[:count] for b in buffers)
        turned = (rotation[0][from_y:to_y], rotation[1][from_x:to_x])
        patch = Patch(image, (from_y, to_y), (from_x, to_x))
        _layers(patch, net.encoders[0], norms[:NORMS], mixed, spare, backend, turned)
        known, last = norms[2 * NORMS : 3 * NORMS - 1], norms[3 * NORMS - 1]
        if same or not fewer:
            _layers(mixed, net.encoders[2], [*known, last], main, spare, backend)
            x = main if same else pixels_of(walk(as_map(main, source)[None], (of_rows, of_columns), backend)[0])
        else:  # averages commute with the last layer, and are fewer
            _layers(mixed, net.encoders[2], known, main, spare, backend)
            pixel_linear(spare, spare, norm=last, backend=backend)
            residual, x = (
                pixels_of(walk(as_map(t, source)[None], (of_rows, of_columns), backend)[0]) for t in (main, spare)
            )
            weight = net.encoders[2].blocks[-1][-1].weight
            pixel_linear(x, x, weight=weight, residual=residual, backend=backend)
        yield x


_statistics = register(
    "image_statistics(Tensor image, Tensor[] parameters, SymInt[] size, SymInt[] grids, bool normalize, "
    "bool recompute, str backend) -> Tensor[]",
    _statistics_requires,
    _statistics_empty,
    _statistics_launch,
    reference=LAUNCHED,
)
_rectangle = register(
    "image_rectangle(Tensor image, Tensor norms, Tensor[] parameters, SymInt[] size, SymInt[] region, bool normalize, "
    "str backend) -> Tensor",
    _rectangle_requires,
    _rectangle_empty,
    _rectangle_launch,
    reference=LAUNCHED,
)
