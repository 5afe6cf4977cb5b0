"""AnyUp's objective: the reconstruction of crops, and two regularizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast.annotations import Size
from murf_fast.ops import _checks
from murf_fast.ops.resize import resize

_RANGE_EPS = 1e-6


def cosine_mse_loss(features: Tensor, target: Tensor) -> Tensor:
    """How far features are from a target, in direction and in value, whatever the backbone's scale.

    The mean over pixels p of ``1 - cos(f_p, t_p) + |f_p - t_p|^2 / (C (max t_p - min t_p + 1e-6)^2)``: the squared
    difference is in units of the range that the target's channels have at that pixel. (The paper's equation 2 writes
    the squared distance alone; the released code divides.)

    Args:
        features: (B, C, H, W), floating point.
        target: The same shape, in any floating dtype; no gradients go to it.

    Returns:
        A scalar, in float32 (float64 if the features are).

    Raises:
        TypeError, ValueError: An argument is no map, or the shapes differ.

    Memory: three maps of the features' size in the result's dtype, kept for the backward.

    Source: AnyUp, equation 2, and its ``Cosine_MSE``.
    """
    op = "cosine_mse_loss"
    _checks.map_(op, "features", features)
    _checks.map_(op, "target", target)
    if features.shape != target.shape:
        raise ValueError(
            f"murf_fast.{op}: `target` must have the shape of `features`, {tuple(features.shape)}, "
            f"got {tuple(target.shape)}"
        )
    _checks.same_device(op, "target", target, "features", features)
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    target = target.detach().to(features.dtype)
    low, high = target.aminmax(dim=1)
    squared = (features - target).square().mean(1) / (high - low + _RANGE_EPS).square()
    return (1 - F.cosine_similarity(features, target, dim=1) + squared).mean()


def input_consistency_loss(upsampled: Tensor, features: Tensor) -> Tensor:
    """How far upsampled features, averaged back to their grid, are from what was upsampled.

    ``cosine_mse_loss(area(upsampled), features)``, with adaptive average pooling to the features' grid. It holds the
    result in the features' space, and in its place.

    Args:
        upsampled: (B, C, H, W), the upsampler's whole result.
        features: (B, C, h, w), what it upsampled; no gradients go to it.

    Returns:
        A scalar, as of :func:`cosine_mse_loss`.

    Raises:
        TypeError, ValueError: An argument is no map, or batch or channels differ.

    Memory: as of :func:`cosine_mse_loss` on the features' grid.

    Source: AnyUp, section 4.3.2.
    """
    op = "input_consistency_loss"
    _checks.map_(op, "upsampled", upsampled)
    _checks.map_(op, "features", features)
    if upsampled.shape[:2] != features.shape[:2]:
        raise ValueError(
            f"murf_fast.{op}: `upsampled` must have batch and channels of `features`, {tuple(features.shape[:2])}, "
            f"got {tuple(upsampled.shape[:2])}"
        )
    return cosine_mse_loss(resize(upsampled, tuple(features.shape[2:]), mode="area"), features)


def self_consistency_loss(
    model: Callable[[Tensor, Tensor, Any], Tensor],
    image: Tensor,
    augmented: Tensor,
    features: Tensor,
    output_size: Size | None = None,
) -> Tensor:
    """How far the result moves when the guidance changes in colour and the features do not.

    ``cosine_mse_loss(model(augmented, features), model(image, features))``; the second is the target, without
    gradients.

    Args:
        model: The upsampler, called with image, features and size of the output; an :class:`AnyUp`, say.
        image: (B, 3, H, W), as the model takes it.
        augmented: The same images in other colours, of the same shape (see :func:`augment_colors`), normalized as
            ``image`` is.
        features: (B, C, h, w), of ``image``.
        output_size: (height, width); None: that of the image, the paper's choice (224 x 224).

    Returns:
        A scalar, as of :func:`cosine_mse_loss`.

    Raises:
        TypeError, ValueError: An image is no map, or their shapes differ; and what the model raises.

    Memory: that of the model with gradients; another result, and as of :func:`cosine_mse_loss`.

    Source: AnyUp, equation 3.
    """
    op = "self_consistency_loss"
    _checks.map_(op, "image", image)
    _checks.map_(op, "augmented", augmented)
    if image.shape != augmented.shape:
        raise ValueError(
            f"murf_fast.{op}: `augmented` must have the shape of `image`, {tuple(image.shape)}, "
            f"got {tuple(augmented.shape)}"
        )
    with torch.no_grad():
        target = model(image, features, output_size)
    return cosine_mse_loss(model(augmented, features, output_size), target)
