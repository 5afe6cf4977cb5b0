"""AnyUp's and JAFAR's three encoders of the image, down to the queries and the pooled keys, without gradients.

Every layer between two normalizations is one pass over the pixels (:mod:`murf_fast.ops._pixel_linear`) in two buffers
that all layers share, image after image. What commutes is done where pixels are few: adaptive pooling comes before the
last 1x1 convolution and residual of an encoder. The 3x3 convolution and the projection of the queries run over bands of
rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from murf_fast.ops import _checks, _contract
from murf_fast.ops._library import empty_map, register
from murf_fast.ops._pixel_conv import pixel_conv, pixel_conv_weight
from murf_fast.ops._pixel_linear import pixel_linear
from murf_fast.ops._pixels import GROUPS, NORM_EPS, Half, normalized, pixels_of, pool
from murf_fast.tables.moments import group_norm

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


def image_queries(
    image: Tensor,
    encoders: Sequence[Sequence[Tensor]],
    frequencies: Tensor,
    convolution: Tensor,
    projection: tuple[Tensor, Tensor],
    size: Sequence[int],
    grid: Sequence[int],
    backend: str,
    *,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """Projected queries (B, C, *size) and encoded keys (B, C, *grid) of an image, both channels_last.

    Args:
        image: (B, 3, H, W).
        encoders: Weights of image, key and query encoder, as :data:`ENCODER` names them.
        frequencies: (2, C) of the position mixing.
        convolution: (C, C, 3, 3), zero padding.
        projection: Weight (C, C), which the queries' norm weights have been multiplied into, and bias (C,).
        normalize: Whether a group norm without weights comes before the convolution (JAFAR).
    """
    parameters = [t for encoder in encoders for t in encoder] + [frequencies, convolution, *projection]
    return _image_queries(image, parameters, list(size), list(grid), normalize, backend)


def _requires(op, image, parameters, size, grid, normalize, backend) -> None:
    _contract.map_(op, "image", image, backend)
    _contract.grid(op, "size", size)
    _contract.grid(op, "grid", grid)
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


def _empty(image, parameters, size, grid, normalize, backend) -> tuple[Tensor, Tensor]:
    channels = parameters[-1].shape[0]
    return tuple(empty_map(image, (image.shape[0], channels, *s), True) for s in (size, grid))


def _launch(image, parameters, size, grid, normalize, backend, results) -> None:
    with torch.autocast(image.device.type, enabled=False):
        _run(image, parameters, size, grid, normalize, backend, results)


def _run(image, parameters, size, grid, normalize, backend, results) -> None:
    # The C++ kernels work in float32 throughout; those for GPUs keep activations in the image's type.
    dtype = torch.float32 if backend == "native" else image.dtype
    image = image.to(dtype)
    *weights, frequencies, convolution, projection, bias = (p.detach() for p in parameters)
    n = len(ENCODER)
    to_image, to_keys, to_queries = (_encoder(weights[i * n : (i + 1) * n], dtype, backend) for i in range(3))
    convolution = pixel_conv_weight(convolution.to(dtype), backend)
    projection, bias = projection.to(dtype).T.contiguous(), bias.float()
    (batch, _, height, width), channels = image.shape, len(bias)
    queries, keys = (torch.empty_like(r, dtype=dtype) if r.dtype != dtype else r for r in results)
    rotation = tuple(_angles(n, f) for n, f in zip((height, width), frequencies, strict=True))
    options = {"dtype": dtype, "device": image.device}
    one, two = (torch.empty((height * width, channels), **options) for _ in range(2))
    same = tuple(size) == (height, width)
    other = None if same else torch.empty_like(one)
    for i in range(batch):
        final = pixels_of(queries[i])
        keep = final if same else other
        mixed = _encode(pixels_of(image[i]), to_image, one, two, backend, (height, width), rotation)
        last = _encode(mixed, to_keys, keep, two, backend, stop=True)
        _finish_pooled(keep, two, last, (height, width), grid, pixels_of(keys[i]), backend)
        last = _encode(mixed, to_queries, one, two, backend, stop=True)
        if same or size[0] * size[1] >= height * width:
            statistics = pixel_linear(
                two,
                one,
                norm=last[:2],
                weight=last.weight,
                residual=one,
                statistics=normalize and same,
                backend=backend,
            )
            encoded = one if same else pool(one, (height, width), size, backend)
            if normalize and not same:
                statistics = pixel_linear(encoded, encoded, statistics=True, backend=backend)
        else:
            encoded = torch.empty((size[0] * size[1], channels), **options)
            statistics = _finish_pooled(one, two, last, (height, width), size, encoded, backend, statistics=normalize)
        norm = _without_weights(statistics, len(encoded)) if normalize else None
        _convolve(encoded, tuple(size), norm, convolution, projection, bias, final, backend)
    for result, made in zip(results, (queries, keys), strict=True):
        if made is not result:
            result.copy_(made)


def _encode(x, encoder: Encoder, main, spare, backend, size=None, rotation=None, *, stop=False):
    """Runs an encoder from ``x`` to ``main``; with ``stop`` all but its last layer, whose norm is returned: its input
    is in ``spare``, its residual in ``main``. ``size`` is that of the map, for a first layer that sees it.
    """
    first = {"weight": encoder.first, "statistics": True, "backend": backend}
    statistics = pixel_conv(x, size, main, reflect=True, **first) if encoder.is_wide else pixel_linear(x, main, **first)
    for i, (opens, closes) in enumerate(encoder.blocks):
        norm = normalized(statistics, opens, len(main))[:2]
        statistics = pixel_linear(main, spare, norm=norm, weight=opens.weight, statistics=True, backend=backend)
        norm = normalized(statistics, closes, len(main))
        last = i + 1 == len(encoder.blocks)
        if last and stop:
            return norm
        options = {"rotation": rotation} if last else {"statistics": True}
        statistics = pixel_linear(
            spare, main, norm=norm[:2], weight=norm.weight, residual=main, backend=backend, **options
        )
    return main


def _finish_pooled(main, spare, last: Half, size, grid, out, backend, *, statistics=False):
    """The encoder's last layer of averages over the cells of ``grid``: both are linear."""
    pixel_linear(spare, spare, norm=last[:2], backend=backend)
    residual, x = (pool(t, size, grid, backend) for t in (main, spare))
    return pixel_linear(x, out, weight=last.weight, residual=residual, statistics=statistics, backend=backend)


def _without_weights(statistics: tuple[Tensor, Tensor], pixels: int) -> tuple[Tensor, Tensor]:
    """Gain and offset of a group norm that has none of its own."""
    mean = statistics[0]
    return group_norm(*statistics, pixels, GROUPS, torch.ones_like(mean), torch.zeros_like(mean), NORM_EPS)


def _convolve(x, size, norm, convolution, projection, bias, out, backend) -> None:
    """Projection of the root-mean-square normalized 3x3 convolution, band after band of rows."""
    height, width = size
    row_bytes = width * x.shape[1] * x.element_size()
    # Even, so that bands cut no tile of the convolution.
    rows = max(8, _BAND_BYTES[x.device.type] // row_bytes // 2 * 2)
    for begin in range(0, height, rows):
        end = min(begin + rows, height)
        band = torch.empty(((end - begin) * width, x.shape[1]), dtype=x.dtype, device=x.device)
        options = {"norm": norm, "activate": False, "rows": (begin, end)}
        pixel_conv(x, size, band, weight=convolution, backend=backend, **options)
        to = out[begin * width : end * width]
        pixel_linear(band, to, unit_eps=UNIT_EPS, weight=projection, bias=bias, backend=backend)


def _encoder(weights: Sequence[Tensor], dtype: torch.dtype, backend: str) -> Encoder:
    first, *rest = weights
    halves = [
        Half(gain, offset, weight.flatten(1).T.to(dtype).contiguous())
        for gain, offset, weight in zip(rest[::3], rest[1::3], rest[2::3], strict=True)
    ]
    is_wide = first.shape[2:] == (3, 3)
    first = pixel_conv_weight(first.to(dtype), backend) if is_wide else first.flatten(1).T.to(dtype).contiguous()
    return Encoder(first, is_wide, (tuple(halves[:2]), tuple(halves[2:])))


def _angles(n: int, frequencies: Tensor) -> Tensor:
    """(n, 2, C): cosines and sines of the positions 0 to 1 times the frequencies."""
    # The float32 positions are the original's; their products are exact enough only in float64.
    at = torch.linspace(0, 1, n, dtype=torch.float32, device=frequencies.device).double()
    angle = at[:, None] * frequencies.double()
    return torch.stack([angle.cos(), angle.sin()], 1).float().contiguous()


_image_queries = register(
    "image_queries(Tensor image, Tensor[] parameters, SymInt[] size, SymInt[] grid, bool normalize, str backend) "
    "-> (Tensor, Tensor)",
    _requires,
    _empty,
    _launch,
)
