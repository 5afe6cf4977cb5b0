"""What FeatSharp is compared with: tiles alone, and tiles averaged with the whole image."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast.ops import _checks
from murf_fast.ops.upsample_mean import upsample_mean


def blend_tiles(low: Tensor, tiles: Tensor, weight: float = 0.5) -> Tensor:
    """``weight up(low) + (1 - weight) tiles``: the coarse map upsampled bilinearly, averaged with the map of tiles.

    A weight of 0 are the tiles alone, 1/2 is the paper's S2, 1 the bilinear baseline.

    Args:
        low: (B, C, h, w), the map of the whole image; floating point, any strides.
        tiles: (B, C, H, W), the maps of the tiles put together (:func:`merge_tiles`).
        weight: Of the coarse map, 0 to 1.

    Returns:
        (B, C, H, W), channels_last by strides, in the dtype of the maps, averaged in float32. Differentiable.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: the result and a copy of each map, weighed.

    Source: FeatSharp, section 4.5 (its beta).
    """
    what = "blend_tiles"
    _checks.map_(what, "low", low)
    _checks.map_(what, "tiles", tiles)
    _checks.same_device_and_dtype(what, "tiles", tiles, "low", low)
    if low.shape[:2] != tiles.shape[:2]:
        raise ValueError(
            f"murf_fast.{what}: `tiles` must have batch and channels of `low`, {tuple(low.shape[:2])}, got "
            f"{tuple(tiles.shape[:2])}"
        )
    weight = _checks.number(what, "weight", weight)
    if not 0 <= weight <= 1:
        raise ValueError(f"murf_fast.{what}: `weight` must be within 0 and 1, got {weight}")
    weights = [weight, 1 - weight]
    return upsample_mean([low, tiles], tuple(tiles.shape[2:]), weights, memory_format=torch.channels_last)
