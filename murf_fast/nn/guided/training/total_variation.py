"""The total variation of feature maps."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast.ops import _checks


def total_variation_loss(features: Tensor, *, power: int = 2, magnitudes: bool = False) -> Tensor:
    """How much features change from place to place: ``mean |F_(y+1) - F_y|^p + mean |F_(x+1) - F_x|^p``.

    The means are over places and channels; a single row or column adds nothing.

    Args:
        features: (B, C, H, W), floating point.
        power: p: 2, or 1 for Rudin's absolute differences.
        magnitudes: Of the features' norms ``|F|_2`` in place of the features, FeatUp's prior, which leaves the
            direction free to turn. Where a feature is zero its norm has the gradient 0.

    Returns:
        A scalar in float32 (float64 if ``features`` are). Differentiable.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: two maps of differences, kept for the backward, of half features a copy in float32; with ``magnitudes`` one
    map and several of one channel.

    Source: Rudin et al. 1992; FeatSharp, Tables 8 and 9, which do not say the power.
    """
    op = "total_variation_loss"
    _checks.map_(op, "features", features)
    power = _checks.integer(op, "power", power, 1, 2)
    _checks.flag(op, "magnitudes", magnitudes)
    x = features.to(torch.promote_types(features.dtype, torch.float32))
    if magnitudes:
        x = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    total = x.new_zeros(())
    for dim in (2, 3):
        if x.numel() and x.shape[dim] > 1:
            differences = x.diff(dim=dim)
            total = total + (differences.square() if power == 2 else differences.abs()).mean()
    return total
