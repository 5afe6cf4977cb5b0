"""Cross-entropy of resized and summed maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import address, dtype_tag, extension
from murf_fast.native._maps import Axes, bias_of, maps_of, pixel_gradients, result_shape

__all__ = ["upsample_cross_entropy", "upsample_cross_entropy_backward"]


def upsample_cross_entropy(
    features: list[Tensor],
    axes: Axes,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    loss: Tensor,
    lse: Tensor,
) -> None:
    """Loss of every pixel, (B, H, W) float32; 0 where ignored, NaN for labels out of range. ``target``: (B, H, W)
    int64, ``weight``: (C,) float32. ``lse``: (2, B, H, W), the largest logit and the logarithm of the sum of
    ``exp(z - largest)``, apart because together they lose the latter.
    """
    maps, _copies = maps_of(features, axes, channels_last=True)
    shape, pixels = result_shape(features, target), target.numel()
    extension.upsample_cross_entropy(
        dtype=dtype_tag(features[0].dtype),
        maps=maps,
        grid=shape,
        bias=bias_of(bias, shape),
        ce=_loss(target, weight, shape, ignore_index, label_smoothing),
        loss=address(loss, torch.float32, pixels),
        lse=address(lse, torch.float32, 2 * pixels),
        threads=_fork.threads(),
    )


def upsample_cross_entropy_backward(
    features: list[Tensor],
    axes: Axes,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    lse: Tensor,
    grad_loss: Tensor,
    gradients: list[Tensor],
) -> None:
    """``gradients`` of the maps: float32, channels_last, overwritten; ``grad_loss`` (B, H, W) float32."""
    maps, _copies = maps_of(features, axes, channels_last=True)
    shape, pixels = result_shape(features, target), target.numel()
    extension.upsample_cross_entropy_backward(
        dtype=dtype_tag(features[0].dtype),
        maps=maps,
        grid=shape,
        bias=bias_of(bias, shape),
        ce=_loss(target, weight, shape, ignore_index, label_smoothing),
        lse=address(lse, torch.float32, 2 * pixels),
        grad_loss=address(grad_loss, torch.float32, pixels),
        gradients=pixel_gradients(features, gradients),
        threads=_fork.threads(),
    )


def _loss(
    target: Tensor, weight: Tensor | None, shape: tuple[int, ...], ignore_index: int, label_smoothing: float
) -> Any:
    return extension.CrossEntropy(
        target=address(target, torch.int64, shape[0] * shape[2] * shape[3]),
        weight=address(weight, torch.float32, shape[1]),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
