"""What chains of layers on rows of pixels share: maps as pixels, norms from statistics, pooling, grids of results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from murf_fast import _extension, backends
from murf_fast.ops.resize import resize
from murf_fast.tables.moments import group_norm

GROUPS, NORM_EPS = 8, 1e-5


class Half(NamedTuple):
    """Group norm, SiLU and convolution: a block has two."""

    gain: Tensor
    offset: Tensor
    weight: Tensor  # (in, out) of a 1x1 convolution
    bias: Tensor | None = None


def normalized(statistics: tuple[Tensor, Tensor], half: Half, pixels: int, backend: str) -> Half:
    """The half with the gain and offset that its norm comes to for inputs of these statistics."""
    gain, offset = norm_of(statistics, half.gain, half.offset, pixels, backend)
    return half._replace(gain=gain, offset=offset)


def norm_of(
    statistics: tuple[Tensor, Tensor], weight: Tensor | None, bias: Tensor | None, pixels: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Gain and offset of a group norm, which may have no weights of its own."""
    launch = group_norm if backend == "reference" else backends.launcher(backend).group_norm
    return launch(*statistics, pixels, GROUPS, weight, bias, NORM_EPS)


def pixels_of(map_: Tensor) -> Tensor:
    """(H * W, C) of a map (C, H, W); a view where its rows follow each other."""
    return map_.permute(1, 2, 0).flatten(0, 1)


def as_map(pixels: Tensor, size: Sequence[int]) -> Tensor:
    """(C, H, W) of its :func:`pixels_of`; a view."""
    return pixels.view(*size, -1).permute(2, 0, 1)


def pool(x: Tensor, size: Sequence[int], grid: Sequence[int], backend: Any) -> Tensor:
    """Adaptive average pooling of pixels; themselves, if there is nothing to pool."""
    if tuple(size) == tuple(grid):
        return x
    map_ = as_map(x, size)[None]
    return pixels_of(resize(map_, tuple(grid), mode="area", memory_format=torch.channels_last, backend=backend)[0])


def arithmetic_of(backend: str, dtype: torch.dtype) -> torch.dtype:
    """The type of activations and products of an image in ``dtype``; sums and statistics are float32 or more.

    The image's own, on CPUs where that pays: in bfloat16 with matrix units for it, else float32.
    """
    if backend != "native" or (dtype == torch.bfloat16 and _extension.current_level() == "amx"):
        return dtype
    return torch.float32


@contextlib.contextmanager
def in_arithmetic_of(backend: str, image: Tensor, results: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Image and results as the kernels compute; the results are copied when all is done."""
    dtype = arithmetic_of(backend, image.dtype)
    maps = [torch.empty_like(r, dtype=dtype) if r.dtype != dtype else r for r in results]
    with torch.autocast(image.device.type, enabled=False):
        yield image.to(dtype), maps
    for result, made in zip(results, maps, strict=True):
        if made is not result:
            result.copy_(made)


def pairs(grids: Sequence[int]) -> list[tuple[int, int]]:
    """(height, width) of grids in a row, as registered ops take them."""
    return list(zip(grids[::2], grids[1::2], strict=True))


def requires_grids(op: str, grids: Sequence[int]) -> None:
    if len(grids) % 2 or any(n < 1 for n in grids):
        raise ValueError(f"murf_fast.{op}: `grids` must be pairs of positive integers, got {tuple(grids)}")
