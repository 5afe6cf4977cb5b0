"""A batch norm over resized, concatenated columns, as a scale and a mean per column, from the maps as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from murf_fast.ops._resize import Resize
from murf_fast.ops.resize_gram import resize_gram


def uses_batch_statistics(norm: _BatchNorm) -> bool:
    return norm.training or norm.running_mean is None


def running_statistics(norm: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(gamma / sqrt(var + eps), mean)`` per column."""
    return _scale(norm, norm.running_var.to(dtype)), norm.running_mean.to(dtype)


def batch_statistics(
    norm: _BatchNorm,
    columns: Sequence[Tensor],
    how: Resize,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    """``gamma / sqrt(var + eps)`` and the centred columns, in ``dtype``; running statistics are updated as torch does.

    Columns are maps (B, C, h, w), whose statistics are those after a resize, or vectors (B, C). By identity
    I6 the mean is ``<1, U f>`` and the biased variance ``<f, U^T U f>`` of the centred map, each per value
    of the resized map.
    """
    means, variances, centred = [], [], []
    values = columns[0].shape[0] * how.size[0] * how.size[1]
    for column in columns:
        x = column.to(dtype)
        if x.ndim == 2:
            means.append(x.mean(0))
            centred.append(x - means[-1])
            variances.append(centred[-1].square().mean(0))
            continue
        ones = torch.ones((1, 1, *x.shape[2:]), dtype=dtype, device=x.device)
        pixel_weights = resize_gram(ones, how, backend).flatten()
        means.append((x.flatten(2) @ pixel_weights).sum(0) / values)
        centred.append(x - means[-1][:, None, None])
        squares = centred[-1] * resize_gram(centred[-1], how, backend)
        variances.append(squares.sum((0, 2, 3)) / values)
    mean, variance = torch.cat(means), torch.cat(variances)
    if norm.training and norm.running_mean is not None:
        _update(norm, mean, variance, values)
    return _scale(norm, variance), centred


def _scale(norm: _BatchNorm, variance: Tensor) -> Tensor:
    scale = torch.rsqrt(variance + norm.eps)
    return scale if norm.weight is None else scale * norm.weight.to(scale.dtype)


@torch.no_grad()
def _update(norm: Any, mean: Tensor, variance: Tensor, values: int) -> None:
    """Moving averages with the unbiased variance; without a momentum, the average over all batches so far."""
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:
        momentum = norm.num_batches_tracked.to(norm.running_mean.dtype).reciprocal()
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_((variance * (values / (values - 1))).to(norm.running_var.dtype), momentum)
