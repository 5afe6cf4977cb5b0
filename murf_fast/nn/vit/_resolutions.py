"""The resolutions of an encoder: lists of sizes or scales as users give them, and the pixels of one image."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from murf_fast.ops import _checks
from murf_fast.scales import Ratio, exact_ratio, scaled_pixels

REMAINDERS = ("raise", "drop")


def checked_sizes(what: str, name: str, sizes: object) -> list[tuple[int, int]]:
    """(height, width) of every resolution; one integer alone is one square resolution."""
    return [_checks.grid(what, name, size) for size in _listed(what, name, sizes, "(height, width) or integers")]


def checked_scales(what: str, scales: object) -> list[Ratio]:
    """The exact ratio of every scale; one number alone is one scale."""
    ratios: list[Ratio] = []
    scale: Any
    for scale in _listed(what, "scales", scales, "numbers"):
        if isinstance(scale, (bool, np.bool_)) or not isinstance(scale, (numbers.Real, Decimal)):
            raise TypeError(f"murf_fast.{what}: `scales` must be numbers, got {scale!r}")
        if not 0 < cast("Any", scale) < float("inf"):
            raise ValueError(f"murf_fast.{what}: `scales` must be > 0 and finite, got {scale!r}")
        ratios.append(exact_ratio(cast("Any", scale)))
    return ratios


def checked_tiles(what: str, tiles: object, count: int) -> list[tuple[int, int]] | None:
    """(rows, columns) of tiles of every resolution; one integer stands for both."""
    if tiles is None:
        return None
    found = [_checks.pair(what, "tiles", t) for t in _listed(what, "tiles", tiles, "integers or (rows, columns)")]
    if len(found) != count:
        raise ValueError(
            f"murf_fast.{what}: `tiles` must hold one entry for each of {count} resolutions, got {tiles!r}"
        )
    return found


def check_whole_patches(
    what: str,
    sizes: Sequence[tuple[int, int]],
    units: Sequence[tuple[int, int]],
    tiles: Sequence[tuple[int, int]] | None,
    remainder: str,
) -> None:
    """Given sizes hold a patch, and only whole ones if they must. ``units``: patch size times tiles, per axis."""
    if remainder not in REMAINDERS:
        raise ValueError(f"murf_fast.{what}: `remainder` must be one of {REMAINDERS}, got {remainder!r}")
    for i, (size, unit) in enumerate(zip(sizes, units, strict=True)):
        told = unit[0] if unit[0] == unit[1] else unit
        if size[0] < unit[0] or size[1] < unit[1]:
            raise ValueError(f"murf_fast.{what}: `sizes[{i}]` must hold a patch of {told} pixels, got {size}")
        is_tiled = tiles is not None and tiles[i] != (1, 1)
        if (size[0] % unit[0] or size[1] % unit[1]) and (remainder == "raise" or is_tiled):
            raise ValueError(
                f"murf_fast.{what}: `sizes[{i}]` must be a multiple of {told} pixels (patch size times tiles), got "
                f'{size}; remainder="drop" drops the pixels beyond the last whole patch (without tiles)'
            )


def scaled_sizes(
    what: str, ratios: Sequence[Ratio], units: Sequence[tuple[int, int]], size: tuple[int, int], rounding: str
) -> list[tuple[int, int]]:
    """``size`` times every scale, rounded by one of the encoder's rules.

    Raises:
        ValueError: A resolution is smaller than a patch; the message names scale, size and patch.
    """
    sizes = []
    for ratio, unit in zip(ratios, units, strict=True):
        height, width = (scaled_pixels(ratio, n, up=rounding == "murf") for n in size)
        pixels = height, width
        if pixels[0] < unit[0] or pixels[1] < unit[1]:
            raise ValueError(
                f"murf_fast.{what}: an image of {size[0]} x {size[1]} pixels at scale {ratio[0] / ratio[1]:g} is "
                f"{pixels[0]} x {pixels[1]}, and must hold a patch of {unit[0]} x {unit[1]} pixels (patch size times "
                "tiles)"
            )
        whole = pixels[0] // unit[0] * unit[0], pixels[1] // unit[1] * unit[1]
        sizes.append(pixels if rounding == "murf" else whole)
    return sizes


def _listed(what: str, name: str, value: object, kind: str) -> list[Any]:
    alone = isinstance(value, (numbers.Number, torch.SymInt)) or (isinstance(value, Tensor) and value.ndim == 0)
    listed = [value] if alone else value
    if not isinstance(listed, Iterable) or isinstance(listed, (str, bytes)):
        raise TypeError(f"murf_fast.{what}: `{name}` must be a list of {kind}, got {value!r}")
    listed = list(listed)
    if not listed:
        raise ValueError(f"murf_fast.{what}: `{name}` must hold at least one resolution, got {value!r}")
    return listed
