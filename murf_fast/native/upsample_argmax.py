"""Labels of resized and summed maps."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast._extension import module
from murf_fast.native._address import address, dtype_tag
from murf_fast.native._maps import Axes, Maps, bias_of, result_shape

__all__ = ["upsample_argmax"]

LABELS = (torch.uint8, torch.int16, torch.int32)


def upsample_argmax(
    features: list[Tensor], axes: Axes, bias: Tensor | None, labels: Tensor, values: Tensor | None
) -> None:
    """``labels = argmax_c(sum_s U_s features[s] + bias)``, and the maxima in ``values``; both dense (B, H, W)."""
    maps = Maps(features, axes, channels_last=True)
    shape, pixels = result_shape(features, labels), labels.numel()
    if labels.dtype not in LABELS:
        raise TypeError(f"murf_fast: labels must be uint8, int16 or int32 for a kernel, got {labels.dtype}")
    module().upsample_argmax(
        dtype_tag(features[0]),
        maps.tuples,
        shape,
        bias_of(bias, shape),
        labels.element_size(),
        address(labels, labels.dtype, pixels),
        address(values, maps.dtype, pixels),
        _fork.threads(),
    )
