from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["log_gradient_loss", "scale_invariant_log_loss"]


def scale_invariant_log_loss(
    depth: Tensor,
    target: Tensor,
    valid: Tensor,
    warm_up: bool = False,
    mean_weight: float = 0.15,
    eps: float = 1e-3,
) -> Tensor:
    """``sqrt(var g + mean_weight (mean g)^2)`` of ``g = log(depth + eps) - log(target + eps)`` where ``valid``.

    The variance is the unbiased one, 0 of fewer than two pixels, and left out of ``warm_up``; the mean of no pixel is
    0. A loss of 0 has the gradient 0.
    """
    difference, count = _log_difference(depth, target, valid, eps), valid.sum()
    mean = difference.sum() / count.clamp(min=1)
    squared = mean_weight * mean.square()
    if not warm_up:
        deviation = (difference - mean).where(valid, 0)
        squared = squared + deviation.square().sum() / (count - 1).clamp(min=1)
    return squared.where(squared > 0, 1).sqrt().where(squared > 0, squared)


def log_gradient_loss(
    depth: Tensor, target: Tensor, valid: Tensor, strides: Sequence[int] = (1, 2, 4, 6), eps: float = 1e-3
) -> Tensor:
    """``sum_s (sum |g_y+2 - g_y| + sum |g_x+2 - g_x|) / N_s`` of every s-th row and column, N_s valid pixels."""
    difference = _log_difference(depth, target, valid, eps)
    total: Any = 0
    for s in strides:
        g, v = difference[:, ::s, ::s], valid[:, ::s, ::s]
        rows = (g[:, 2:] - g[:, :-2]).abs().where(v[:, 2:] & v[:, :-2], 0)
        columns = (g[:, :, 2:] - g[:, :, :-2]).abs().where(v[:, :, 2:] & v[:, :, :-2], 0)
        total = total + (rows.sum() + columns.sum()) / v.sum().clamp(min=1)
    return total


def _log_difference(depth: Tensor, target: Tensor, valid: Tensor, eps: float) -> Tensor:
    """0 where not ``valid``, whatever stands there."""
    dtype = torch.promote_types(depth.dtype, torch.float32)
    depth, target = (x.to(dtype).where(valid, 1) for x in (depth, target))
    return (depth + eps).log() - (target + eps).log()
