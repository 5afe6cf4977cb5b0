"""What tiles lose: features of an image cut into ever more tiles against those of the whole at the same resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from murf_fast.annotations import Size
from murf_fast.nn._options import PassOptions
from murf_fast.nn.vit import _images
from murf_fast.nn.vit.multi_resolution_encoder import encoder_of
from murf_fast.ops import _checks

if TYPE_CHECKING:
    from typing_extensions import Unpack


@torch.no_grad()
def over_tiling_error(
    model: nn.Module,
    images: Tensor,
    levels: Sequence[int] = (1, 2, 3, 4),
    *,
    size: Size | None = None,
    **options: Unpack[PassOptions],
) -> Tensor:
    """``mean (f(resize(image, n size)) - tiles_n(resize(image, n size)))^2`` for every level n.

    Level n has n x n tiles of ``size`` pixels, which the model sees one by one, and the whole of n * ``size`` pixels as
    one sequence. A model that keeps its features at any resolution has an error all the same, as tiles lack context.

    Args:
        model: Frozen, one that :class:`MultiResolutionEncoder` takes.
        images: (B, 3, H, W) or (B, H, W, 3), uint8 or floating point, best at the finest level.
        levels: Tiles of a side.
        size: (height, width) of a tile in pixels, whole patches, one integer for a square; None: the images' size
            divided by the largest level.
        options: Of the encoder (layers, norm, mean, std, mode, antialias, attention); one layer.

    Returns:
        (B, levels), the mean over places and channels, in float32 (float64 of a model in float64).

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: as the encoder, at one level's size twice; levels come one after the other.

    Source: FeatSharp, appendix F, Figure 15.
    """
    op = "over_tiling_error"
    if not _checks.is_sequence(levels) or len(levels) == 0:
        raise TypeError(f"murf_fast.{op}: `levels` must be a non-empty list of integers, got {levels!r}")
    levels = [_checks.integer(op, "levels", n, 1) for n in levels]
    layers = options.get("layers")
    if layers is not None and _checks.is_sequence(layers) and len(layers) != 1:
        raise ValueError(f"murf_fast.{op}: `layers` must be one layer, got {layers!r}")
    fine, most = _images.size_of(op, images), max(levels)
    if size is None:
        if any(n % most for n in fine):
            raise ValueError(
                f"murf_fast.{op}: `size` is needed for images of {fine}, no multiple of the largest level, {most}"
            )
        size = (fine[0] // most, fine[1] // most)
    height, width = _checks.grid(op, "size", size)
    errors = []
    for n in levels:
        whole = (n * height, n * width)
        maps = encoder_of(model, [whole, whole], tiles=[1, n], **options)(images).maps
        one, cut = (m.to(torch.promote_types(m.dtype, torch.float32)) for m in maps)
        errors.append((one - cut).square().mean((1, 2, 3)))
    return torch.stack(errors, 1)
