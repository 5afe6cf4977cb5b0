"""Expected values under the softmax of resized and summed maps."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import address, dtype_tag, extension
from murf_fast.native._maps import Axes, bias_of, maps_of, pixel_gradients, result_shape

__all__ = ["upsample_expectation", "upsample_expectation_backward"]


def upsample_expectation(
    features: list[Tensor], axes: Axes, bias: Tensor | None, values: Tensor, softmax: bool, out: Tensor
) -> None:
    """``out = sum_k p_k values_k``, (B, H, W) float32, of ``values`` (C,) float32; p the softmax or the normalized
    relu + 0.1 of the logits ``sum_s U_s features[s] + bias``.
    """
    maps, _copies = maps_of(features, axes, channels_last=True)
    shape = result_shape(features, out)
    extension.upsample_expectation(
        dtype=dtype_tag(features[0].dtype),
        maps=maps,
        grid=shape,
        bias=bias_of(bias, shape),
        values=address(values, torch.float32, shape[1]),
        softmax=softmax,
        out=address(out, torch.float32, out.numel()),
        threads=_fork.threads(),
    )


def upsample_expectation_backward(
    features: list[Tensor],
    axes: Axes,
    bias: Tensor | None,
    values: Tensor,
    softmax: bool,
    grad_out: Tensor,
    gradients: list[Tensor],
    row_value_gradients: Tensor | None,
) -> None:
    """``gradients`` of the maps: float32, channels_last, overwritten. ``row_value_gradients`` of the values: one sum
    (B, H, C) float32 per output row.
    """
    maps, _copies = maps_of(features, axes, channels_last=True)
    shape = result_shape(features, grad_out)
    extension.upsample_expectation_backward(
        dtype=dtype_tag(features[0].dtype),
        maps=maps,
        grid=shape,
        bias=bias_of(bias, shape),
        values=address(values, torch.float32, shape[1]),
        softmax=softmax,
        grad_out=address(grad_out, torch.float32, grad_out.numel()),
        gradients=pixel_gradients(features, gradients),
        row_value_gradients=address(row_value_gradients, torch.float32, shape[0] * shape[1] * shape[2]),
        threads=_fork.threads(),
    )
