"""SigLIP-HD: multi-scale averages as targets of a student that sees one scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast.nn.vit import _images
from murf_fast.nn.vit.multi_resolution_encoder import encoder_of
from murf_fast.ops import _checks
from murf_fast.ops.upsample_mean import upsample_mean


def multi_scale_target(
    model: nn.Module,
    images: Tensor,
    factors: Sequence[int] = (1, 2),
    *,
    size: int | tuple[int, int] | None = None,
    mode: str = "bilinear",
    antialias: bool = True,
    **options,
) -> Tensor:
    """The teacher's map: base scale and finer scales in non-overlapping tiles, averaged on the base grid.

    ``F_t = mean_f down(tiles_f(resize(image, f * size)))``. Every tile has the base's size, so base and tiles are one
    batch. The downsample is bilinear: the mean of 2 x 2 cells for a factor of 2, the middle cell for 3.

    Args:
        model: The frozen teacher, one that :class:`MultiResolutionEncoder` takes.
        images: (B, 3, H, W) or (B, H, W, 3), uint8 or floating point, best at the finest scale.
        factors: Scales as multiples of ``size``; factor f is cut into f x f tiles.
        size: (height, width) of the base scale in pixels, one integer for a square; None for the images' size divided
            by the largest factor.
        mode, antialias: How images are resized.
        options: The other options of the encoder (layers, norm, mean, std, attention); one layer.

    Returns:
        (B, D, h, w), channels_last by strides, without gradients.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: as the encoder, and one copy of each tiled map.

    Source: SigLIP-HD, sections 2 and 3.
    """
    op = "multi_scale_target"
    if not _checks.is_sequence(factors) or len(factors) == 0:
        raise ValueError(f"murf_fast.{op}: `factors` must be positive integers, got {factors!r}")
    factors = [_checks.integer(op, "factors", factor, 1) for factor in factors]
    if len(options.get("layers") or [0]) != 1:
        raise ValueError(f"murf_fast.{op}: `layers` must be one layer, got {options['layers']!r}")
    height, width = _images.size_of(op, images)
    if size is None:
        if height % max(factors) or width % max(factors):
            raise ValueError(
                f"murf_fast.{op}: `size` is needed for images of {(height, width)}, no multiple of the largest factor, "
                f"{max(factors)}"
            )
        size = (height // max(factors), width // max(factors))
    base = _checks.grid(op, "size", size)
    sizes = [(f * base[0], f * base[1]) for f in factors]
    encoder = encoder_of(model, sizes, tiles=factors, mode=mode, antialias=antialias, **options)
    with torch.no_grad():
        maps = encoder(images).maps
        grid = tuple(n // encoder.family.patch_size for n in base)
        return upsample_mean(maps, grid, memory_format=torch.channels_last)


def fine_to_coarse_loss(features: Tensor, target: Tensor) -> Tensor:
    """``mean |F_s - F_t|``: the student's map at the base scale against :func:`multi_scale_target`.

    Args:
        features: (B, D, h, w), the student's, floating point.
        target: (B, D, h, w) in any floating dtype, which is converted to that of the features; no gradients go to it.

    Returns:
        A scalar in the dtype of the features.

    Raises:
        TypeError, ValueError: An argument is no map, or the shapes differ.

    Memory: two maps of differences, a copy of a target of another dtype; in the backward four maps, the gradient among
    them.

    Source: SigLIP-HD, section 3 and Table 8.
    """
    op = "fine_to_coarse_loss"
    _checks.map_(op, "features", features)
    _checks.map_(op, "target", target)
    if features.shape != target.shape:
        raise ValueError(
            f"murf_fast.{op}: `target` must have the shape of `features`, {tuple(features.shape)}, "
            f"got {tuple(target.shape)}"
        )
    return F.l1_loss(features, target.detach().to(features.dtype))
