"""AnyUp's three encoders of the image, down to the queries and the pooled keys, without gradients.

Every layer between two normalizations is one pass over the pixels (:mod:`murf_fast.ops._pixel_linear`) in two buffers
that all layers share, image after image. What commutes is done where pixels are few: adaptive pooling comes before the
last 1x1 convolution and residual of an encoder. The 3x3 convolution and the projection of the queries run over bands of
rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast.ops import _checks, _contract
from murf_fast.ops._library import empty_map, register
from murf_fast.ops._pixel_linear import pixel_linear
from murf_fast.ops.resize import resize
from murf_fast.tables.moments import group_norm

GROUPS, NORM_EPS = 8, 1e-5
# nn.RMSNorm without an eps takes that of the tensor's type; the weights were trained with this one.
UNIT_EPS = torch.finfo(torch.float32).eps

# What an encoder holds, in the order of its layers.
ENCODER = ("0.weight", *(f"{b}.block.{i}" for b in (1, 2) for i in
           ("0.weight", "0.bias", "2.weight", "3.weight", "3.bias", "5.weight")))  # fmt: skip
# Bytes of a band's activations: it should stay in a CPU's cache, and fill a GPU.
_BAND_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}


class Half(NamedTuple):
    """Group norm, SiLU and 1x1 convolution: a residual block has two."""

    gain: Tensor
    offset: Tensor
    weight: Tensor  # (in, out)


class Encoder(NamedTuple):
    first: Tensor  # (in, out)
    blocks: tuple[tuple[Half, Half], tuple[Half, Half]]


class Network(NamedTuple):
    """The parameters of a call, as the layers take them."""

    encoders: tuple[Encoder, Encoder, Encoder]  # of the image, the keys and the queries
    frequencies: Tensor  # (2, C)
    convolution: Tensor  # (C, C, 3, 3), channels_last
    projection: Tensor  # (in, out)
    bias: Tensor  # (C,), float32


def image_queries(
    image: Tensor,
    encoders: Sequence[Sequence[Tensor]],
    frequencies: Tensor,
    convolution: Tensor,
    projection: tuple[Tensor, Tensor],
    size: Sequence[int],
    grids: Sequence[Sequence[int]],
    backend: str,
) -> list[Tensor]:
    """Projected queries (B, C, *size) of an image and its encoded keys (B, C, *grid) for every grid, channels_last.

    Args:
        image: (B, 3, H, W).
        encoders: Weights of image, key and query encoder, as :data:`ENCODER` names them.
        frequencies: (2, C) of the position mixing.
        convolution: (C, C, 3, 3), zero padding.
        projection: Weight (C, C), which the queries' norm weights have been multiplied into, and bias (C,).
    """
    parameters = flat(encoders, frequencies, convolution, projection)
    return _image_queries(image, parameters, list(size), [n for grid in grids for n in grid], backend)


def flat(encoders, frequencies, convolution, projection) -> list[Tensor]:
    """The parameters as the registered ops take them."""
    return [t for encoder in encoders for t in encoder] + [frequencies, convolution, *projection]


def _requires(op, image, parameters, size, grids, backend) -> None:
    requires_network(op, image, parameters, backend)
    _contract.grid(op, "size", size)
    requires_grids(op, grids)


def requires_grids(op: str, grids: Sequence[int]) -> None:
    if len(grids) % 2 or any(n < 1 for n in grids):
        raise ValueError(f"murf_fast.{op}: `grids` must be pairs of positive integers, got {tuple(grids)}")


def requires_network(op: str, image: Tensor, parameters: Sequence[Tensor], backend: str) -> None:
    _contract.map_(op, "image", image, backend)
    _contract.count(op, "parameters", parameters, 3 * len(ENCODER) + 4)
    _contract.tensor(op, "parameters[-1]", parameters[-1], image, (None,), _checks.DTYPES)
    channels = len(parameters[-1])
    if channels < 1 or channels % GROUPS:
        raise ValueError(f"murf_fast.{op}: `parameters[-1]` must have a multiple of {GROUPS} entries, got {channels}")
    square, vector = (channels, channels), (channels,)
    shapes = []
    for inputs in (image.shape[1], channels, channels):
        shapes += [(channels, inputs), *[s for _ in range(4) for s in (vector, vector, square)]]
    shapes += [(2, channels), (channels, 9 * channels), square, vector]
    for i, (x, shape) in enumerate(zip(parameters, shapes, strict=True)):
        flat = x.flatten(1) if x.ndim == 4 else x
        _contract.tensor(op, f"parameters[{i}]", flat, image, shape, _checks.DTYPES)
    if parameters[-3].shape[1:] != (channels, 3, 3):
        raise ValueError(f"murf_fast.{op}: `parameters[-3]` must be a 3 x 3 convolution")


def pairs(grids: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(grids[::2], grids[1::2], strict=True))


def empty_maps(image: Tensor, parameters: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Maps of the queries' channels."""
    channels = parameters[-1].shape[0]
    return [empty_map(image, (image.shape[0], channels, *size), True) for size in sizes]


def _empty(image, parameters, size, grids, backend) -> list[Tensor]:
    return empty_maps(image, parameters, [size, *pairs(grids)])


def _launch(image, parameters, size, grids, backend, results) -> None:
    with torch.autocast(image.device.type, enabled=False), in_arithmetic_of(backend, image, results) as (image, maps):
        _run(image, network(parameters, image.dtype), size, backend, *maps)


@contextlib.contextmanager
def in_arithmetic_of(backend: str, image: Tensor, results: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Image and results as the kernels compute; the results are copied when all is done.

    The C++ kernels work in float32 throughout; those for GPUs keep activations in the image's type.
    """
    dtype = torch.float32 if backend == "native" else image.dtype
    maps = [torch.empty_like(r, dtype=dtype) if r.dtype != dtype else r for r in results]
    yield image.to(dtype), maps
    for result, made in zip(results, maps, strict=True):
        if made is not result:
            result.copy_(made)


def network(parameters: Sequence[Tensor], dtype: torch.dtype) -> Network:
    *weights, frequencies, convolution, projection, bias = (p.detach() for p in parameters)
    n = len(ENCODER)
    encoders = tuple(_encoder(weights[i * n : (i + 1) * n], dtype) for i in range(3))
    convolution = convolution.to(dtype).contiguous(memory_format=torch.channels_last)
    return Network(encoders, frequencies, convolution, projection.to(dtype).T.contiguous(), bias.float())


def rotation_of(net: Network, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions of rows and columns."""
    return tuple(_angles(n, f) for n, f in zip(size, net.frequencies, strict=True))


def _run(image, net, size, backend, queries, *keys) -> None:
    (batch, _, height, width), channels = image.shape, len(net.bias)
    to_image, to_keys, to_queries = net.encoders
    rotation = rotation_of(net, (height, width))
    options = {"dtype": image.dtype, "device": image.device}
    one, two = (torch.empty((height * width, channels), **options) for _ in range(2))
    same = tuple(size) == (height, width)
    other = None if same else torch.empty_like(one)
    for i in range(batch):
        final = pixels(queries[i])
        keep = final if same else other
        mixed = encode(pixels(image[i]), to_image, one, two, backend, rotation)
        last = encode(mixed, to_keys, keep, two, backend, stop=True)
        finish_pooled(keep, two, last, (height, width), [k[i] for k in keys], backend)
        last = encode(mixed, to_queries, one, two, backend, stop=True)
        if same or size[0] * size[1] >= height * width:
            pixel_linear(two, one, norm=last[:2], weight=last.weight, residual=one, backend=backend)
            encoded = one if same else _pool(one, (height, width), size, backend)
        else:
            encoded = torch.empty((size[0] * size[1], channels), **options)
            finish_pooled(one, two, last, (height, width), [as_map(encoded, size)], backend)
        _convolve(encoded, tuple(size), net, final, backend)


def pixels(map_: Tensor) -> Tensor:
    """(H * W, C) of a map (C, H, W); a view where its rows follow each other."""
    return map_.permute(1, 2, 0).flatten(0, 1)


def as_map(rows: Tensor, size: Sequence[int]) -> Tensor:
    """(C, H, W) of its :func:`pixels`."""
    return rows.view(*size, -1).permute(2, 0, 1)


def encode(x, encoder: Encoder, main, spare, backend, rotation=None, *, stop=False, found: list | None = None):
    """Runs an encoder from ``x`` to ``main``; with ``stop`` all but its last layer, whose norm is returned: its input
    is in ``spare``, its residual in ``main``. Gain and offset of every norm are appended to ``found``.
    """
    found = [] if found is None else found
    statistics = pixel_linear(x, main, weight=encoder.first, statistics=True, backend=backend)
    for i, (opens, closes) in enumerate(encoder.blocks):
        norm = norm_of(statistics, opens, len(main))[:2]
        statistics = pixel_linear(main, spare, norm=norm, weight=opens.weight, statistics=True, backend=backend)
        found.append(norm)
        norm = norm_of(statistics, closes, len(main))
        found.append(norm[:2])
        last = i + 1 == len(encoder.blocks)
        if last and stop:
            return norm
        options = {"rotation": rotation} if last else {"statistics": True}
        statistics = pixel_linear(
            spare, main, norm=norm[:2], weight=norm.weight, residual=main, backend=backend, **options
        )
    return main


def norm_of(statistics: tuple[Tensor, Tensor], half: Half, pixels: int) -> Half:
    gain, offset = group_norm(*statistics, pixels, GROUPS, half.gain, half.offset, NORM_EPS)
    return Half(gain, offset, half.weight)


def finish_pooled(main, spare, last: Half, size, maps: Sequence[Tensor], backend) -> None:
    """The encoder's last layer of averages over the cells of every map (C, h, w): both are linear."""
    pixel_linear(spare, spare, norm=last[:2], backend=backend)
    for map_ in maps:
        residual, x = (_pool(t, size, map_.shape[1:], backend) for t in (main, spare))
        pixel_linear(x, pixels(map_), weight=last.weight, residual=residual, backend=backend)


def _pool(x: Tensor, size: Sequence[int], grid: Sequence[int], backend: str) -> Tensor:
    """Adaptive average pooling of pixels."""
    if tuple(size) == tuple(grid):
        return x
    map_ = as_map(x, size)[None]
    return pixels(resize(map_, tuple(grid), mode="area", memory_format=torch.channels_last, backend=backend)[0])


def rows_of_a_band(x: Tensor, width: int) -> int:
    """Rows of ``width`` pixels (.., C) whose activations are a band."""
    return max(8, _BAND_BYTES[x.device.type] // (width * x.shape[1] * x.element_size()))


def _convolve(x, size, net: Network, out, backend) -> None:
    """Projection of the root-mean-square normalized 3x3 convolution, band after band of rows."""
    height, width = size
    map_ = as_map(x, size)[None]
    rows = rows_of_a_band(x, width)
    for begin in range(0, height, rows):
        end = min(begin + rows, height)
        above, below = int(begin == 0), int(end == height)
        band = map_[:, :, max(begin - 1, 0) : end + 1]
        if above or below:
            band = F.pad(band, (0, 0, above, below))
        project(F.conv2d(band, net.convolution, padding=(0, 1)), net, out[begin * width : end * width], backend)


def project(convolved: Tensor, net: Network, out: Tensor, backend: str) -> None:
    """Queries (pixels, C) of a map (1, C, H, W) of the 3x3 convolution."""
    x = pixels(convolved.contiguous(memory_format=torch.channels_last)[0])
    pixel_linear(x, out, unit_eps=UNIT_EPS, weight=net.projection, bias=net.bias, backend=backend)


def _encoder(weights: Sequence[Tensor], dtype: torch.dtype) -> Encoder:
    first, *rest = weights
    halves = [
        Half(gain, offset, weight.flatten(1).T.to(dtype).contiguous())
        for gain, offset, weight in zip(rest[::3], rest[1::3], rest[2::3], strict=True)
    ]
    return Encoder(first.flatten(1).T.to(dtype).contiguous(), (tuple(halves[:2]), tuple(halves[2:])))


def _angles(n: int, frequencies: Tensor) -> Tensor:
    """(n, 2, C): cosines and sines of the positions 0 to 1 times the frequencies."""
    # The float32 positions are the original's; their products are exact enough only in float64.
    at = torch.linspace(0, 1, n, dtype=torch.float32, device=frequencies.device).double()
    angle = at[:, None] * frequencies.double()
    return torch.stack([angle.cos(), angle.sin()], 1).float().contiguous()


_image_queries = register(
    "image_queries(Tensor image, Tensor[] parameters, SymInt[] size, SymInt[] grids, str backend) -> Tensor[]",
    _requires,
    _empty,
    _launch,
)
