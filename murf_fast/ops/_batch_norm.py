"""A batch norm over resized, concatenated maps, as one scale and one mean per column, from the maps as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from murf_fast.ops.resize_gram import resize_gram


def uses_batch_statistics(norm: _BatchNorm) -> bool:
    return norm.training or norm.running_mean is None


def scale_and_mean(
    norm: _BatchNorm,
    features: Sequence[Tensor],
    cls: Sequence[Tensor | None],
    grid: Sequence[int],
    mode: str,
    antialias: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``(gamma / sqrt(var + eps), mean)`` per column in ``dtype``; running statistics are updated as torch does."""
    if uses_batch_statistics(norm):
        mean, variance = _statistics(features, cls, grid, mode, antialias, dtype, backend)
        if norm.training and norm.running_mean is not None:
            _update(norm, mean, variance, values=features[0].shape[0] * grid[0] * grid[1])
    else:
        mean, variance = norm.running_mean.to(dtype), norm.running_var.to(dtype)
    scale = torch.rsqrt(variance + norm.eps)
    return (scale if norm.weight is None else scale * norm.weight.to(dtype)), mean


def _statistics(features, cls, grid, mode, antialias, dtype, backend) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every column at ``grid``, by identity I6: ``<1, U f>`` and ``<f, U^T U f>``."""
    means, variances = [], []
    values = features[0].shape[0] * grid[0] * grid[1]
    for feature, token in zip(features, cls, strict=True):
        x = feature.to(dtype)
        ones = torch.ones((1, 1, *x.shape[2:]), dtype=dtype, device=x.device)
        pixel_weights = resize_gram(ones, grid, mode, antialias, backend).flatten()
        mean = (x.flatten(2) @ pixel_weights).sum(0) / values
        # Centred first, against cancellation. A shift of the data does not change the variance: no gradient through it.
        centred = x - mean.detach()[:, None, None]
        means.append(mean)
        variances.append((centred * resize_gram(centred, grid, mode, antialias, backend)).sum((0, 2, 3)) / values)
        if token is not None:
            variance, mean = torch.var_mean(token.to(dtype), dim=0, correction=0)
            means.append(mean)
            variances.append(variance)
    return torch.cat(means), torch.cat(variances)


@torch.no_grad()
def _update(norm: _BatchNorm, mean: Tensor, variance: Tensor, values: int) -> None:
    """Moving averages with the unbiased variance; without a momentum, the average over all batches so far."""
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:
        momentum = norm.num_batches_tracked.to(norm.running_mean.dtype).reciprocal()
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_((variance * (values / (values - 1))).to(norm.running_var.dtype), momentum)
