"""Cross-entropy of resized and summed maps."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast._extension import module
from murf_fast.native._address import address, dtype_tag
from murf_fast.native._maps import Axes, Maps, bias_of, pixel_gradients, result_shape

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
    maps = Maps(features, axes, channels_last=True)
    shape, pixels = result_shape(features, target), target.numel()
    module().upsample_cross_entropy(
        dtype_tag(features[0]),
        maps.tuples,
        shape,
        bias_of(bias, shape),
        _loss(target, weight, shape, ignore_index, label_smoothing),
        address(loss, torch.float32, pixels),
        address(lse, torch.float32, 2 * pixels),
        _fork.threads(),
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
    maps = Maps(features, axes, channels_last=True)
    shape, pixels = result_shape(features, target), target.numel()
    module().upsample_cross_entropy_backward(
        dtype_tag(features[0]),
        maps.tuples,
        shape,
        bias_of(bias, shape),
        _loss(target, weight, shape, ignore_index, label_smoothing),
        address(lse, torch.float32, 2 * pixels),
        address(grad_loss, torch.float32, pixels),
        pixel_gradients(features, gradients),
        _fork.threads(),
    )


def _loss(target: Tensor, weight: Tensor | None, shape: tuple, ignore_index: int, smoothing: float) -> tuple:
    pixels = shape[0] * shape[2] * shape[3]
    weights = address(weight, torch.float32, shape[1])
    return address(target, torch.int64, pixels), weights, ignore_index, smoothing
