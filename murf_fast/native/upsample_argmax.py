"""Labels of resized and summed maps."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import address, dtype_tag, extension
from murf_fast.native._maps import Axes, bias_of, maps_of, result_shape

__all__ = ["upsample_argmax"]

LABELS = (torch.uint8, torch.int16, torch.int32)


def upsample_argmax(
    features: list[Tensor], axes: Axes, bias: Tensor | None, labels: Tensor, values: Tensor | None
) -> None:
    """``labels = argmax_c(sum_s U_s features[s] + bias)``, and the maxima in ``values``; both dense (B, H, W)."""
    maps, _copies = maps_of(features, axes, channels_last=True)
    shape, pixels = result_shape(features, labels), labels.numel()
    if labels.dtype not in LABELS:
        raise TypeError(f"murf_fast: labels must be uint8, int16 or int32 for a kernel, got {labels.dtype}")
    extension.upsample_argmax(
        dtype=dtype_tag(features[0].dtype),
        maps=maps,
        grid=shape,
        bias=bias_of(bias, shape),
        label_bytes=labels.element_size(),
        labels=address(labels, labels.dtype, pixels),
        values=address(values, features[0].dtype, pixels),
        threads=_fork.threads(),
    )
