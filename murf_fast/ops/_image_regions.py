"""AnyUp's queries of a rectangle: what needs the whole image first, the norms and the keys, then the rectangle alone.

The norms of the three encoders are statistics of the whole image, each of what the norms before it leave. Either all
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
    network,
    project,
    reach,
    requires_network,
    requires_region,
    rotation_of,
    rows_of_a_band,
)
from murf_fast.ops._library import axes_of, register
from murf_fast.ops._pixel_linear import pixel_linear
from murf_fast.ops._pixels import as_map, in_arithmetic_of, normalized, pairs, pixels_of, requires_grids
from murf_fast.tables.moments import join
from murf_fast.tables.resize import part

NORMS = 4  # of an encoder


def image_statistics(
    image: Tensor, parameters: Sequence[Tensor], grids: Sequence[Sequence[int]], recompute: bool, backend: str
) -> list[Tensor]:
    """Norms (B, 12, 2, C) in float32, a gain and an offset for each of image, key and query encoder, and the encoded
    keys (B, C, *grid) for every grid.

    Args:
        image: (B, 3, H, W).
        parameters: Those of :func:`murf_fast.ops._image_encoders.flat`.
        recompute: In bands of rows, from the image on for every norm.
    """
    return _statistics(image, list(parameters), [n for grid in grids for n in grid], recompute, backend)


def image_rectangle(
    image: Tensor,
    norms: Tensor,
    parameters: Sequence[Tensor],
    size: Sequence[int],
    region: Sequence[int],
    backend: str,
) -> Tensor:
    """Projected queries (B, C, height, width) of ``region``, (top, left, height, width) of the output of ``size``."""
    return _rectangle(image, norms, list(parameters), list(size), list(region), backend)


def _statistics_requires(op, image, parameters, grids, recompute, backend) -> None:
    _requires_pointwise(op, image, parameters, backend)
    requires_grids(op, grids)


def _statistics_empty(image, parameters, grids, recompute, backend) -> list[Tensor]:
    norms = image.new_empty((image.shape[0], 3 * NORMS, 2, parameters[-1].shape[0]), dtype=torch.float32)
    return [norms, *empty_maps(image, parameters, pairs(grids))]


def _statistics_launch(image, parameters, grids, recompute, backend, results) -> None:
    norms, *keys = results
    with in_arithmetic_of(backend, image, keys) as (image, maps):
        net = network(parameters, image.dtype, backend)
        for i, x in enumerate(image):
            found = (_in_bands if recompute else _in_maps)(x, net, [m[i] for m in maps], backend)
            norms[i].copy_(torch.stack([torch.stack(norm) for norm in found]))


def _in_maps(image: Tensor, net: Network, keys: Sequence[Tensor], backend: str) -> list[tuple[Tensor, Tensor]]:
    """All norms, over three maps of the image's size; fills ``keys``, (C, h, w) each."""
    size, found = image.shape[1:], []
    one, two, three = (image.new_empty((size[0] * size[1], len(net.bias))) for _ in range(3))
    to_image, to_keys, to_queries = net.encoders
    mixed = encode(pixels_of(image), to_image, one, two, backend, size, rotation_of(net, size), found=found)
    last = encode(mixed, to_keys, three, two, backend, stop=True, found=found)
    finish_pooled(three, two, last, size, keys, backend)
    encode(mixed, to_queries, one, two, backend, stop=True, found=found)
    return found


def _in_bands(image: Tensor, net: Network, keys: Sequence[Tensor], backend: str) -> list[tuple[Tensor, Tensor]]:
    """The same, over bands of rows."""
    height, width = image.shape[1:]
    angles, of_columns = rotation_of(net, (height, width))
    rows = min(height, rows_of_a_band(net.bias[None].to(image.dtype), (0, width)))
    buffers = [image.new_empty((rows * width, len(net.bias))) for _ in range(3)]
    found: list[list] = [[], [], []]

    def bands() -> Iterator[tuple[int, int, list[Tensor]]]:
        """First row, end, and the buffers; the first holds the encoded image once all of its norms are known."""
        for begin in range(0, height, rows):
            end = min(begin + rows, height)
            own = [b[: (end - begin) * width] for b in buffers]
            yield begin, end, own

    def encoded(begin: int, end: int, own: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        rotation = (angles[begin:end], of_columns)
        return _layers(pixels_of(image[:, begin:end]), net.encoders[0], found[0], own[0], own[1], backend, rotation)

    for _ in range(NORMS):
        parts = [encoded(*band) for band in bands()]
        found[0].append(_joined(parts, net.encoders[0], len(found[0]), rows * width, height * width))
    for _ in range(NORMS):
        parts = ([], [])
        for begin, end, own in bands():
            encoded(begin, end, own)
            for i in (1, 2):
                parts[i - 1].append(_layers(own[0], net.encoders[i], found[i], *own[1:], backend))
        for i in (1, 2):
            found[i].append(_joined(parts[i - 1], net.encoders[i], len(found[i]), rows * width, height * width))
    if keys:
        totals = [(torch.zeros_like(pixels_of(k)), torch.zeros_like(pixels_of(k))) for k in keys]
        for begin, end, own in bands():
            encoded(begin, end, own)
            _layers(own[0], net.encoders[1], found[1][:3], *own[1:], backend)
            pixel_linear(own[2], own[2], norm=found[1][3], backend=backend)
            for key, total in zip(keys, totals, strict=True):
                for x, sums in zip(own[1:], total, strict=True):
                    _add_pooled(as_map(x, (end - begin, width)), begin, height, as_map(sums, key.shape[1:]), backend)
        weight = net.encoders[1].blocks[-1][-1].weight
        for key, (residual, x) in zip(keys, totals, strict=True):
            pixel_linear(x, pixels_of(key), weight=weight, residual=residual, backend=backend)
    return [norm for norms in found for norm in norms]


def _layers(
    x: Tensor,
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
    statistics = pixel_linear(x, main, weight=encoder.first, statistics=known == 0, backend=backend)
    for i in range(known):
        layer = encoder.blocks[i // 2][i % 2]
        options = {"norm": norms[i], "weight": layer.weight, "statistics": i + 1 == known < NORMS, "backend": backend}
        if i % 2 == 0:
            statistics = pixel_linear(main, spare, **options)
        else:
            rotate = rotation if i + 1 == NORMS else None
            statistics = pixel_linear(spare, main, residual=main, rotation=rotate, **options)
    return statistics


def _joined(parts: list, encoder: Encoder, at: int, size: int, total: int) -> tuple[Tensor, Tensor]:
    """Norm number ``at`` of an encoder, from the statistics of bands of ``size`` pixels (the last of what is left)."""
    statistics = join(torch.stack([torch.stack(p) for p in parts]), size, total)
    return normalized(statistics, encoder.blocks[at // 2][at % 2], total)[:2]


def _add_pooled(band: Tensor, begin: int, height: int, sums: Tensor, backend: str) -> None:
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
    averaged = _walk(band[None], (axes_of(rows, rows, (rows, rows), "area", False)[0], of_columns), backend)[0]
    sums[:, low:high] += torch.einsum("ij,cjw->ciw", shares.to(band.device), averaged)


def _walk(x: Tensor, axes, backend: str) -> Tensor:
    """A map (1, C, H, W), channels_last, through two tables."""
    size = tuple(a.out_size for a in axes)
    out = torch.empty((1, x.shape[1], *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    backends.launcher(backend).upsample_sum([x], [axes], None, out)
    return out


def _rectangle_requires(op, image, norms, parameters, size, region, backend) -> None:
    _requires_pointwise(op, image, parameters, backend)
    shape = (image.shape[0], 3 * NORMS, 2, len(parameters[-1]))
    _contract.tensor(op, "norms", norms, image, shape, (torch.float32,))
    requires_region(op, size, region)


def _requires_pointwise(op, image, parameters, backend) -> None:
    requires_network(op, image, parameters, backend)
    if parameters[0].shape[2:] == (3, 3):
        raise ValueError(f"murf_fast.{op}: `parameters[0]` must be a 1 x 1 convolution")


def _rectangle_empty(image, norms, parameters, size, region, backend) -> Tensor:
    return empty_maps(image, parameters, [region[2:]])[0]


def _rectangle_launch(image, norms, parameters, size, region, backend, result) -> None:
    with in_arithmetic_of(backend, image, [result]) as (image, [queries]):
        net = network(parameters, image.dtype, backend)
        for x, n, o in zip(image, norms, queries, strict=True):
            _rectangle_of(x, n.unbind(0), net, size, region, o, backend)


def _rectangle_of(image, norms, net: Network, size, region, out: Tensor, backend) -> None:
    size, image_size, channels = tuple(size), tuple(image.shape[1:]), len(net.bias)
    norms = [norm.unbind(0) for norm in norms]
    rotation = rotation_of(net, image_size)
    axes = axes_of(*image_size, size, "area", False)
    same = size == image_size
    fewer = size[0] * size[1] < image_size[0] * image_size[1]
    across = reach(region, size)
    from_x, of_columns = part(axes[1], *across)
    to_x = from_x + of_columns.in_size
    wider = max((from_x, to_x), across, key=lambda ends: ends[1] - ends[0])
    buffers: list[Tensor] = []
    for band in bands_of(size, region, rows_of_a_band(net.bias[None].to(image.dtype), wider)):
        from_y, of_rows = part(axes[0], *band.source[0])
        to_y = from_y + of_rows.in_size
        source = (to_y - from_y, to_x - from_x)
        count = source[0] * source[1]
        if not buffers or len(buffers[0]) < count:
            buffers = [image.new_empty((count, channels)) for _ in range(3)]
        mixed, main, spare = (b[:count] for b in buffers)
        turned = (rotation[0][from_y:to_y], rotation[1][from_x:to_x])
        x = pixels_of(image[:, from_y:to_y, from_x:to_x])
        _layers(x, net.encoders[0], norms[:NORMS], mixed, spare, backend, turned)
        known, last = norms[2 * NORMS : 3 * NORMS - 1], norms[-1]
        if same or not fewer:
            _layers(mixed, net.encoders[2], [*known, last], main, spare, backend)
            x = main if same else pixels_of(_walk(as_map(main, source)[None], (of_rows, of_columns), backend)[0])
        else:  # averages commute with the last layer, and are fewer
            _layers(mixed, net.encoders[2], known, main, spare, backend)
            pixel_linear(spare, spare, norm=last, backend=backend)
            residual, x = (
                pixels_of(_walk(as_map(t, source)[None], (of_rows, of_columns), backend)[0]) for t in (main, spare)
            )
            weight = net.encoders[2].blocks[-1][-1].weight
            pixel_linear(x, x, weight=weight, residual=residual, backend=backend)
        project(x, band, None, net, out, backend)


_statistics = register(
    "image_statistics(Tensor image, Tensor[] parameters, SymInt[] grids, bool recompute, str backend) -> Tensor[]",
    _statistics_requires,
    _statistics_empty,
    _statistics_launch,
)
_rectangle = register(
    "image_rectangle(Tensor image, Tensor norms, Tensor[] parameters, SymInt[] size, SymInt[] region, str backend) "
    "-> Tensor",
    _rectangle_requires,
    _rectangle_empty,
    _rectangle_launch,
)
