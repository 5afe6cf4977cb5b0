"""NAF's two encoders of the image, down to the queries and the pooled keys, without gradients.

Layers between two group norms are passes over the pixels: those of the 1x1 encoder
(:mod:`murf_fast.ops._pixel_linear`) in place on a CPU, those of the 3x3 encoder (:mod:`murf_fast.ops._pixel_conv`) and
all on a GPU between two buffers.
Where the image has the queries' size their halves serve as buffers, and one map of half their channels is all that is
kept beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from murf_fast.ops import _checks, _contract
from murf_fast.ops._library import LAUNCHED, empty_map, register
from murf_fast.ops._pixel_conv import pixel_conv, pixel_conv_weight
from murf_fast.ops._pixel_linear import pixel_linear
from murf_fast.ops._pixels import (
    GROUPS,
    Half,
    in_arithmetic_of,
    normalized,
    pairs,
    pixels_of,
    pool,
    requires_grids,
)

# What a block holds, in the order of its layers; an encoder begins with the weight and the bias of a convolution.
BLOCK = ("norm1.weight", "norm1.bias", "conv1.weight", "conv1.bias",
         "norm2.weight", "norm2.bias", "conv2.weight", "conv2.bias")  # fmt: skip


class Encoder(NamedTuple):
    first: Tensor
    bias: Tensor
    halves: list[Half]


def naf_queries(
    image: Tensor,
    encoders: tuple[Sequence[Tensor], Sequence[Tensor]],
    turns: tuple[Tensor, Tensor],
    num_heads: int,
    grids: Sequence[Sequence[int]],
    backend: str,
) -> list[Tensor]:
    """Turned queries (B, D, rows, columns) of an image and keys (B, D, *grid) for every grid, all channels_last.

    Args:
        image: (B, 3, H, W) from 2 x 2.
        encoders: Weights of the 1x1 and of the 3x3 encoder: weight and bias of a convolution to D / 2 channels, and
            :data:`BLOCK` of every block.
        turns: Angles of the rows (rows, D / heads / 4) and columns (columns, D / heads / 4) of the queries, by which
            the first and the second half of every head's pairs of channels turn; float32.
        num_heads: Heads; contiguous groups of channels, of which channel i turns with i + D / heads / 2.
    """
    parameters = [*encoders[0], *encoders[1]]
    return _naf_queries(image, parameters, *turns, num_heads, [n for grid in grids for n in grid], backend)


def requires(op, image, parameters, rows, columns, num_heads, grids, backend) -> None:
    _contract.map_(op, "image", image, backend)
    requires_grids(op, grids)
    if min(image.shape[2:]) < 2:
        raise ValueError(f"murf_fast.{op}: `image` must have at least 2 rows and columns, got {tuple(image.shape[2:])}")
    count, rest = divmod(len(parameters), 2)
    if rest or count < 2 + len(BLOCK) or (count - 2) % len(BLOCK):
        raise ValueError(f"murf_fast.{op}: `parameters` must be those of two encoders alike, got {len(parameters)}")
    _contract.tensor(op, "parameters[1]", parameters[1], image, (None,), _checks.DTYPES)
    half = len(parameters[1])
    if half < 1 or half % GROUPS or num_heads < 1 or 2 * half % (4 * num_heads):
        raise ValueError(
            f"murf_fast.{op}: `parameters[1]` must have a multiple of {GROUPS} and of two times the heads, got {half} "
            f"entries and {num_heads} heads"
        )
    for e, taps in enumerate((1, 3)):
        shapes = [(half, image.shape[1], taps, taps), (half,)]
        shapes += [(half, half, taps, taps) if name.startswith("conv") and name.endswith("weight") else (half,)
                   for _ in range((count - 2) // len(BLOCK)) for name in BLOCK]  # fmt: skip
        for i, shape in enumerate(shapes):
            at = e * count + i
            _contract.tensor(op, f"parameters[{at}]", parameters[at], image, shape, _checks.DTYPES)
    for name, turns in (("rows", rows), ("columns", columns)):
        shape = (None, half // num_heads // 2)
        _contract.tensor(op, name, turns, image, shape, (torch.float32,))
    _contract.grid(op, "queries", (len(rows), len(columns)))


def _empty(image, parameters, rows, columns, num_heads, grids, backend) -> list[Tensor]:
    sizes = [(rows.shape[0], columns.shape[0]), *pairs(grids)]
    return [empty_map(image, (image.shape[0], 2 * parameters[1].shape[0], *size), True) for size in sizes]


def _launch(image, parameters, rows, columns, num_heads, grids, backend, results) -> None:
    with in_arithmetic_of(backend, image, results) as (image, (queries, *keys)):
        _run(image, parameters, rows, columns, num_heads, backend, queries, keys)


def _run(image, parameters, rows, columns, num_heads, backend, queries, keys) -> None:
    encoders = networks(parameters, image.dtype, backend)
    rotation, size = rotation_of(rows, columns, num_heads), (len(rows), len(columns))
    for i, x in enumerate(image):
        own = [k[i] for k in keys]
        encode(x, encoders, rotation, size, num_heads, backend, pixels_of(queries[i]), own)


def networks(parameters: Sequence[Tensor], dtype: torch.dtype, backend: str) -> tuple[Encoder, Encoder]:
    """The 1x1 and the 3x3 encoder."""
    parameters, count = [p.detach() for p in parameters], len(parameters) // 2
    pointwise, wide = (_encoder(parameters[i * count : (i + 1) * count], dtype, backend) for i in range(2))
    return pointwise, wide


def encode(
    image: Tensor,
    encoders: tuple[Encoder, Encoder],
    rotation: tuple[Tensor, Tensor],
    size: tuple[int, int],
    num_heads: int,
    backend: str,
    final: Tensor,
    keys: Sequence[Tensor],
    found: list[Any] | None = None,
) -> None:
    """Fills the queries (pixels, D) of an image (3, H, W), and its keys (D, h, w). Gain and offset of every norm are
    appended to ``found``.
    """
    (pointwise, wide), inner, half = encoders, tuple(image.shape[1:]), final.shape[1] // 2
    same, found = inner == size, [] if found is None else found
    spare = image.new_empty((inner[0] * inner[1], half))
    buffer = None if same else torch.empty_like(spare)
    x = pixels_of(image)
    to = final[:, :half] if same else buffer
    made, last = _encode_pointwise(x, pointwise, to, spare, backend, found)

    def pooled(x: Tensor) -> Tensor:
        return pool(x, inner, size, backend)

    fewer = size[0] * size[1] < inner[0] * inner[1]
    finish_pointwise(made, last, pooled, same, fewer, final[:, :half], backend)
    to = final[:, half:] if same else buffer
    made = _encode_wide(x, inner, wide, to, spare, backend, found)
    if not same:
        final[:, half:] = pooled(made)
    pixel_linear(final, final, rotation=rotation, heads=num_heads, backend=backend)
    for k in keys:
        pixels_of(k).copy_(pool(final, size, k.shape[1:], backend))


def _encode_pointwise(x, encoder: Encoder, to, spare, backend, found: list[Any]) -> tuple[Tensor, Half]:
    """What all layers but the last make, and that layer with its norm.

    In ``to`` on a CPU, which has the pixels in its caches. A GPU's programs share the channels of a pixel: it goes to
    and fro, and ends in ``spare``, so that the last layer may write to ``to``.
    """
    *halves, last = encoder.halves
    here, there = (to, spare) if len(halves) % 2 else (spare, to)
    if backend == "native":
        here = there = to
    options = {"statistics": True, "backend": backend}
    statistics = pixel_linear(x, here, weight=encoder.first, bias=encoder.bias, **options)
    for half in halves:
        half = normalized(statistics, half, len(to), backend)
        found.append(half[:2])
        statistics = pixel_linear(here, there, norm=half[:2], weight=half.weight, bias=half.bias, **options)
        here, there = there, here
    last = normalized(statistics, last, len(to), backend)
    found.append(last[:2])
    return here, last


def finish_pointwise(x, last: Half, pooled: Callable[[Tensor], Tensor], same: bool, fewer: bool, out, backend) -> None:
    """The last layer and the pooling, which commute: first whichever leaves fewer pixels."""
    options = {"weight": last.weight, "bias": last.bias, "backend": backend}
    if same:
        pixel_linear(x, out, norm=last[:2], **options)
    elif fewer:
        pixel_linear(x, x, norm=last[:2], backend=backend)
        pixel_linear(pooled(x), out, **options)
    else:
        pixel_linear(x, x, norm=last[:2], **options)
        out.copy_(pooled(x))


def _encode_wide(x, size, encoder: Encoder, to, spare, backend, found: list[Any]) -> Tensor:
    """All layers; an odd number of them, so that the first and the last one write to ``to``, which is returned."""
    options = {"reflect": True, "backend": backend}
    statistics = pixel_conv(x, size, to, weight=encoder.first, bias=encoder.bias, statistics=True, **options)
    here, there = to, spare
    for i, half in enumerate(encoder.halves):
        half = normalized(statistics, half, len(to), backend)
        found.append(half[:2])
        options["statistics"] = i + 1 < len(encoder.halves)
        statistics = pixel_conv(here, size, there, norm=half[:2], weight=half.weight, bias=half.bias, **options)
        here, there = there, here
    return here


def _encoder(weights: Sequence[Tensor], dtype: torch.dtype, backend: str) -> Encoder:
    def made(weight: Tensor) -> Tensor:
        weight = weight.to(dtype)
        is_wide = weight.shape[2:] == (3, 3)
        return pixel_conv_weight(weight, backend) if is_wide else weight.flatten(1).T.contiguous()

    first, bias, *rest = weights
    halves = [
        Half(gain, offset, made(weight), shift.float().contiguous())
        for gain, offset, weight, shift in zip(rest[::4], rest[1::4], rest[2::4], rest[3::4], strict=True)
    ]
    return Encoder(made(first), bias.float().contiguous(), halves)


def rotation_of(rows: Tensor, columns: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """(rows, 2, D) and (columns, 2, D): cosines and sines. A pair that turns by rows does not by columns."""
    still = [torch.zeros_like(turns) for turns in (rows, columns)]
    pairs = torch.cat([rows, still[0]], 1), torch.cat([still[1], columns], 1)
    of_rows, of_columns = (
        torch.stack([p.cos(), p.sin()], 1).repeat(1, 1, 2 * heads).float().contiguous() for p in pairs
    )
    return of_rows, of_columns


_naf_queries = register(
    "naf_queries(Tensor image, Tensor[] parameters, Tensor rows, Tensor columns, int num_heads, SymInt[] grids, "
    "str backend) -> Tensor[]",
    requires,
    _empty,
    _launch,
    reference=LAUNCHED,
)
