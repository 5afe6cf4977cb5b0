"""Views of images for an encoder, a whole one and tiles of finer scales; and the maps that are made of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from murf_fast import _arguments
from murf_fast.annotations import Mode, Size
from murf_fast.nn.guided.featsharp_jbu import prime_steps
from murf_fast.nn.vit import _images
from murf_fast.ops import _checks
from murf_fast.ops.resize import resize

Pair = tuple[int, int]


def split_tiles(
    images: Tensor,
    factor: Size,
    size: Size,
    *,
    progressive: bool = False,
    mode: Mode = "bilinear",
    antialias: bool = False,
) -> Tensor:
    """Views of one size: the whole image, and the tiles that the image makes ``factor`` times as large.

    ``resize(image, n size)`` for n = 1 and n = factor, cut into n x n tiles of ``size``: one batch for
    an encoder that sees all of them at the resolution it was trained for.

    Args:
        images: (B, 3, H, W) or (B, H, W, 3), uint8 (then divided by 255) or floating point.
        factor: Tiles per axis, (rows, columns) or one number for both, at least 1. At 1 there is only the whole image.
        size: (height, width) of a view in pixels, or one number for a square.
        progressive: Also the levels between, one for every prime factor: for 6 those of 2 and 6.
        mode, antialias: How images are resized, as for :func:`murf_fast.resize`; the original's are the defaults.

    Returns:
        (views * B, 3, height, width), with ``views = 1 + factor_y factor_x`` (and those of the levels between); float32
        at least. Level by level, rows and columns of tiles, then the images of the batch. Differentiable.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: the result and the resized images, one level at a time.

    Source: FeatSharp, section 3.3 and Figure 4.
    """
    what = "split_tiles"
    _images.size_of(what, images)
    factor, size = _arguments.pair(what, "factor", factor), _checks.grid(what, "size", size)
    _checks.mode(what, mode, antialias)
    pixels = _images.as_floats(images)
    views = []
    for rows, columns in levels_of(what, factor, progressive):
        whole = (rows * size[0], columns * size[1])
        resized = resize(pixels, whole, mode=mode, antialias=antialias, memory_format=torch.contiguous_format)
        tiled = resized.unflatten(3, (columns, size[1])).unflatten(2, (rows, size[0]))
        views.append(tiled.permute(2, 4, 0, 1, 3, 5).flatten(0, 2))
    return views[0] if len(views) == 1 else torch.cat(views)


def merge_tiles(maps: Tensor, factor: Size, *, progressive: bool = False) -> list[Tensor]:
    """The maps of the views of :func:`split_tiles`, those of tiles put together.

    Args:
        maps: (views * B, C, h, w), what an encoder makes of the views; any strides.
        factor, progressive: As for :func:`split_tiles`.

    Returns:
        For every level (B, C, rows * h, columns * w), channels_last by strides: the map of the whole image first (a
        view of ``maps``), that of the finest tiles last. At a factor of 1 it is the only one. Differentiable.

    Raises:
        TypeError, ValueError: An argument is wrong, or the batch is no multiple of the views.

    Memory: the finer maps, each written once.

    Source: FeatSharp, section 3.3 and Figure 4.
    """
    what = "merge_tiles"
    _checks.map_(what, "maps", maps)
    levels = levels_of(what, _arguments.pair(what, "factor", factor), progressive)
    views = sum(rows * columns for rows, columns in levels)
    if maps.shape[0] % views:
        raise ValueError(
            f"murf_fast.{what}: `maps` must have a multiple of {views} views for a factor of {factor}, got "
            f"{maps.shape[0]}"
        )
    batch = maps.shape[0] // views
    tokens = maps.permute(0, 2, 3, 1).split([rows * columns * batch for rows, columns in levels])
    return [_merged(part, level, batch) for part, level in zip(tokens, levels, strict=True)]


def levels_of(what: str, factor: Pair, progressive: bool) -> list[Pair]:
    """Tiles (rows, columns) of every level: the whole image, the products of the first primes, the factor."""
    _checks.flag(what, "progressive", progressive)
    levels = [(1, 1)]
    for step in prime_steps(factor) if progressive else [factor]:
        levels.append((levels[-1][0] * step[0], levels[-1][1] * step[1]))
    return list(dict.fromkeys(levels))


def _merged(tokens: Tensor, level: Sequence[int], batch: int) -> Tensor:
    """(B, C, rows h, columns w) from (rows columns B, h, w, C)."""
    rows, columns = level
    if (rows, columns) == (1, 1):
        return tokens.permute(0, 3, 1, 2)
    tiled = tokens.unflatten(0, (rows, columns, batch)).permute(2, 0, 3, 1, 4, 5)
    return tiled.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
