"""AnyUp's and JAFAR's three encoders of the image, down to the queries and the pooled keys, without gradients.

Every layer between two normalizations is one pass over the pixels (:mod:`murf_fast.ops._pixel_linear`) in two buffers
that all layers share, image after image. What commutes is done where pixels are few: adaptive pooling comes before the
last 1x1 convolution and residual of an encoder. The 3x3 convolution and the projection of the queries run over bands of
rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from murf_fast.ops import _checks, _contract
from murf_fast.ops._library import LAUNCHED, empty_map, register
from murf_fast.ops._pixel_conv import columns_read, pixel_conv, pixel_conv_weight
from murf_fast.ops._pixel_linear import pixel_linear
from murf_fast.ops._pixels import (
    GROUPS,
    Half,
    as_map,
    in_arithmetic_of,
    norm_of,
    normalized,
    pairs,
    pixels_of,
    pool,
    requires_grids,
)

# nn.RMSNorm without an eps takes that of the tensor's type; the weights were trained with this one.
UNIT_EPS = torch.finfo(torch.float32).eps

# What an encoder holds, in the order of its layers.
ENCODER = ("0.weight", *(f"{b}.block.{i}" for b in (1, 2) for i in
           ("0.weight", "0.bias", "2.weight", "3.weight", "3.bias", "5.weight")))  # fmt: skip
# Bytes of a band's activations: it should stay in a CPU's cache, and fill a GPU.
_BAND_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}


class Encoder(NamedTuple):
    first: Tensor  # (in, out), or of a 3x3 convolution
    is_wide: bool
    blocks: tuple[tuple[Half, Half], tuple[Half, Half]]


class Network(NamedTuple):
    """The parameters of a call, as the layers take them."""

    encoders: tuple[Encoder, Encoder, Encoder]  # of the image, the keys and the queries
    frequencies: Tensor  # (2, C)
    convolution: Tensor  # of pixel_conv_weight
    projection: Tensor  # (in, out)
    bias: Tensor  # (C,), float32


def image_queries(
    image: Tensor,
    encoders: Sequence[Sequence[Tensor]],
    frequencies: Tensor,
    convolution: Tensor,
    projection: tuple[Tensor, Tensor],
    size: Sequence[int],
    region: Sequence[int],
    grids: Sequence[Sequence[int]],
    backend: str,
    *,
    normalize: bool = False,
) -> list[Tensor]:
    """Projected queries (B, C, height, width) of a rectangle of an image's output, and its encoded keys (B, C, *grid)
    for every grid, channels_last.

    Args:
        image: (B, 3, H, W).
        encoders: Weights of image, key and query encoder, as :data:`ENCODER` names them.
        frequencies: (2, C) of the position mixing.
        convolution: (C, C, 3, 3), zero padding.
        projection: Weight (C, C), which the queries' norm weights have been multiplied into, and bias (C,).
        size: (height, width) of the whole output.
        region: (top, left, height, width) of the rectangle: of it alone is the convolution. On the CPU it is a crop of
            the whole, bit for bit; where products are cuDNN's, up to rounding.
        normalize: Whether a group norm without weights comes before the convolution (JAFAR).
    """
    parameters, flat_grids = flat(encoders, frequencies, convolution, projection), [n for grid in grids for n in grid]
    return _image_queries(image, parameters, list(size), list(region), flat_grids, normalize, backend)


def flat(encoders, frequencies, convolution, projection) -> list[Tensor]:
    """The parameters as the registered ops take them."""
    return [t for encoder in encoders for t in encoder] + [frequencies, convolution, *projection]


def _requires(op, image, parameters, size, region, grids, normalize, backend) -> None:
    requires_network(op, image, parameters, backend)
    requires_region(op, size, region)
    requires_grids(op, grids)


def requires_region(op: str, size: Sequence[int], region: Sequence[int]) -> None:
    _contract.grid(op, "size", size)
    _contract.count(op, "region", region, 4)
    top, left, height, width = region
    if min(top, left) < 0 or min(height, width) < 1 or top + height > size[0] or left + width > size[1]:
        raise ValueError(f"murf_fast.{op}: `region` must lie within {tuple(size)}, got {tuple(region)}")


def requires_network(op: str, image: Tensor, parameters: Sequence[Tensor], backend: str) -> None:
    _contract.map_(op, "image", image, backend)
    _contract.count(op, "parameters", parameters, 3 * len(ENCODER) + 4)
    _contract.tensor(op, "parameters[-1]", parameters[-1], image, (None,), _checks.DTYPES)
    channels = len(parameters[-1])
    if channels < 1 or channels % GROUPS:
        raise ValueError(f"murf_fast.{op}: `parameters[-1]` must have a multiple of {GROUPS} entries, got {channels}")
    square, vector = (channels, channels), (channels,)
    shapes = []
    taps = 9 if parameters[0].shape[2:] == (3, 3) else 1
    if taps > 1 and min(image.shape[2:]) < 2:
        raise ValueError(f"murf_fast.{op}: `image` must have at least 2 rows and columns, got {tuple(image.shape[2:])}")
    for inputs in (image.shape[1] * taps, channels, channels):
        shapes += [(channels, inputs), *[s for _ in range(4) for s in (vector, vector, square)]]
    shapes += [(2, channels), (channels, 9 * channels), square, vector]
    for i, (x, shape) in enumerate(zip(parameters, shapes, strict=True)):
        flat = x.flatten(1) if x.ndim == 4 else x
        _contract.tensor(op, f"parameters[{i}]", flat, image, shape, _checks.DTYPES)
    if parameters[-3].shape[1:] != (channels, 3, 3):
        raise ValueError(f"murf_fast.{op}: `parameters[-3]` must be a 3 x 3 convolution")


def empty_maps(image: Tensor, parameters: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Maps of the queries' channels."""
    channels = parameters[-1].shape[0]
    return [empty_map(image, (image.shape[0], channels, *size), True) for size in sizes]


def _empty(image, parameters, size, region, grids, normalize, backend) -> list[Tensor]:
    return empty_maps(image, parameters, [region[2:], *pairs(grids)])


def _launch(image, parameters, size, region, grids, normalize, backend, results) -> None:
    with in_arithmetic_of(backend, image, results) as (image, (queries, *keys)):
        _run(image, network(parameters, image.dtype, backend), size, region, normalize, backend, queries, keys)


def network(parameters: Sequence[Tensor], dtype: torch.dtype, backend: str) -> Network:
    *weights, frequencies, convolution, projection, bias = (p.detach() for p in parameters)
    n = len(ENCODER)
    image, keys, queries = (_encoder(weights[i * n : (i + 1) * n], dtype, backend) for i in range(3))
    convolution = pixel_conv_weight(convolution.to(dtype), backend)
    return Network((image, keys, queries), frequencies, convolution, projection.to(dtype).T.contiguous(), bias.float())


def rotation_of(net: Network, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions of rows and columns."""
    rows, columns = (_angles(n, f) for n, f in zip(size, net.frequencies, strict=True))
    return rows, columns


def _run(image, net, size, region, normalize, backend, queries, keys) -> None:
    inner, channels = tuple(image.shape[2:]), len(net.bias)
    size, region = tuple(size), tuple(region)
    to_image, to_keys, to_queries = net.encoders
    rotation = rotation_of(net, inner)
    options = {"dtype": image.dtype, "device": image.device}
    one, two = (torch.empty((inner[0] * inner[1], channels), **options) for _ in range(2))
    same = size == inner
    other = None if same and region == (0, 0, *size) else torch.empty_like(one)
    for i in range(len(image)):
        # The result is a buffer too, if it is as large.
        keep = pixels_of(queries[i]) if other is None else other
        mixed = encode(pixels_of(image[i]), to_image, one, two, backend, inner, rotation)
        last = encode(mixed, to_keys, keep, two, backend, stop=True)
        finish_pooled(keep, two, last, inner, [k[i] for k in keys], backend)
        last = encode(mixed, to_queries, one, two, backend, stop=True)
        encoded, norm = finish_queries(one, two, last, inner, size, normalize, backend)
        for band in bands_of(size, region, rows_of_a_band(encoded, reach(region, size))):
            (top, bottom), (left, right) = band.source
            source = encoded.view(*size, channels)[top:bottom, left:right].flatten(0, 1)
            project(source, band, norm, net, queries[i], backend)


def encode(
    x, encoder: Encoder, main, spare, backend, size=None, rotation=None, *, stop=False, found: list[Any] | None = None
):
    """Runs an encoder from ``x`` to ``main``; with ``stop`` all but its last layer, whose norm is returned: its input
    is in ``spare``, its residual in ``main``. ``size`` is that of the map, for a first layer that sees it. Gain and
    offset of every norm are appended to ``found``.
    """
    found = [] if found is None else found
    first = {"weight": encoder.first, "statistics": True, "backend": backend}
    statistics = pixel_conv(x, size, main, reflect=True, **first) if encoder.is_wide else pixel_linear(x, main, **first)
    for i, (opens, closes) in enumerate(encoder.blocks):
        norm = normalized(statistics, opens, len(main), backend)[:2]
        statistics = pixel_linear(main, spare, norm=norm, weight=opens.weight, statistics=True, backend=backend)
        found.append(norm)
        norm = normalized(statistics, closes, len(main), backend)
        found.append(norm[:2])
        last = i + 1 == len(encoder.blocks)
        if last and stop:
            return norm
        options = {"rotation": rotation} if last else {"statistics": True}
        statistics = pixel_linear(
            spare, main, norm=norm[:2], weight=norm.weight, residual=main, backend=backend, **options
        )
    return main


def finish_pooled(main, spare, last: Half, size, maps: Sequence[Tensor], backend, *, statistics=False) -> list[Any]:
    """The encoder's last layer of averages over the cells of every map (C, h, w): both are linear. Returns what the
    layer does, for each.
    """
    pixel_linear(spare, spare, norm=last[:2], backend=backend)
    options, found = {"weight": last.weight, "statistics": statistics, "backend": backend}, []
    for map_ in maps:
        residual, x = (pool(t, size, map_.shape[1:], backend) for t in (main, spare))
        found.append(pixel_linear(x, pixels_of(map_), residual=residual, **options))
    return found


def finish_queries(main, spare, last: Half, inner, size, normalize: bool, backend):
    """The last layer of the queries' encoder, of averages over the cells of an output of ``size``: its pixels, and if
    they are to be normalized gain and offset of that norm.
    """
    if inner == size or size[0] * size[1] >= inner[0] * inner[1]:
        options = {"norm": last[:2], "weight": last.weight, "residual": main, "backend": backend}
        statistics = pixel_linear(spare, main, statistics=normalize and inner == size, **options)
        encoded = pool(main, inner, size, backend)
        if normalize and inner != size:
            statistics = pixel_linear(encoded, encoded, statistics=True, backend=backend)
    else:
        encoded = torch.empty((size[0] * size[1], main.shape[1]), dtype=main.dtype, device=main.device)
        [statistics] = finish_pooled(main, spare, last, inner, [as_map(encoded, size)], backend, statistics=normalize)
    return encoded, norm_of(statistics, None, None, len(encoded), backend) if normalize else None


class Band(NamedTuple):
    """Rows of a rectangle of queries, and the part of the map that their 3x3 convolution reads.

    Tiles of the convolution begin where they do in the whole map, so that the queries are the same bit for bit.
    """

    begin: int  # of a tile, in the map; at ``first`` or a row before it
    first: int
    end: int
    source: tuple[tuple[int, int], tuple[int, int]]  # rows and columns, begin and end
    region: Sequence[int]  # the rectangle, (top, left, height, width)


def reach(region: Sequence[int], size: Sequence[int]) -> tuple[int, int]:
    """Columns that the convolution reads for a rectangle of the output."""
    return columns_read(region[1], region[1] + region[3], size[1])


def bands_of(size: Sequence[int], region: Sequence[int], rows: int) -> Iterator[Band]:
    """Bands of an even number of ``rows``, but for the first and the last."""
    top, _, height, _ = region
    for begin in range(top - top % 2, top + height, rows):
        first, end = max(begin, top), min(begin + rows, top + height)
        source = (max(first - 1, 0), min(end + 1, size[0])), reach(region, size)
        yield Band(begin, first, end, source, region)


def rows_of_a_band(x: Tensor, columns: tuple[int, int]) -> int:
    """Rows of pixels (.., C) in these columns whose activations are a band; even, as tiles of the convolution."""
    row_bytes = (columns[1] - columns[0]) * x.shape[1] * x.element_size()
    return max(8, _BAND_BYTES[x.device.type] // row_bytes // 2 * 2)


def project(x, band: Band, norm, net: Network, out: Tensor, backend: str) -> None:
    """Fills a band of the rectangle ``out`` (C, height, width): projection of the root-mean-square normalized 3x3
    convolution of the pixels of its source.
    """
    (from_y, to_y), (from_x, to_x) = band.source
    top, left, _, columns = band.region
    width, channels = to_x - from_x, len(net.bias)
    made = torch.empty(((band.end - band.begin) * width, channels), dtype=x.dtype, device=x.device)
    options = {"norm": norm, "activate": False, "rows": (band.begin - from_y, band.end - from_y), "backend": backend}
    pixel_conv(x, (to_y - from_y, width), made, weight=net.convolution, **options)
    made = made.view(-1, width, channels)[band.first - band.begin :, left - from_x : left - from_x + columns]
    to = pixels_of(out)[(band.first - top) * columns : (band.end - top) * columns]
    pixel_linear(made.flatten(0, 1), to, unit_eps=UNIT_EPS, weight=net.projection, bias=net.bias, backend=backend)


def _encoder(weights: Sequence[Tensor], dtype: torch.dtype, backend: str) -> Encoder:
    first, *rest = weights
    a, b, c, d = (
        Half(gain, offset, weight.flatten(1).T.to(dtype).contiguous())
        for gain, offset, weight in zip(rest[::3], rest[1::3], rest[2::3], strict=True)
    )
    is_wide = first.shape[2:] == (3, 3)
    first = pixel_conv_weight(first.to(dtype), backend) if is_wide else first.flatten(1).T.to(dtype).contiguous()
    return Encoder(first, is_wide, ((a, b), (c, d)))


def _angles(n: int, frequencies: Tensor) -> Tensor:
    """(n, 2, C): cosines and sines of the positions 0 to 1 times the frequencies."""
    # The float32 positions are the original's; their products are exact enough only in float64.
    at = torch.linspace(0, 1, n, dtype=torch.float32, device=frequencies.device).double()
    angle = at[:, None] * frequencies.double()
    return torch.stack([angle.cos(), angle.sin()], 1).float().contiguous()


_image_queries = register(
    "image_queries(Tensor image, Tensor[] parameters, SymInt[] size, SymInt[] region, SymInt[] grids, bool normalize, "
    "str backend) -> Tensor[]",
    _requires,
    _empty,
    _launch,
    reference=LAUNCHED,
)
