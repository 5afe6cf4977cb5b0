"""Counts of labels and classes of resized and summed maps."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import address, dtype_tag, extension
from murf_fast.native._maps import Axes, bias_of, maps_of, result_shape

__all__ = ["upsample_confusion"]

LABELS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def upsample_confusion(
    features: list[Tensor], axes: Axes, bias: Tensor | None, target: Tensor, ignore_index: int, counts: Tensor
) -> None:
    """Adds to ``counts`` (C, C), int64 and dense, the pixels of every label in ``target`` (B, H, W), dense, and class
    ``argmax_c(sum_s U_s features[s] + bias)``. A label that is no class raises.
    """
    maps, _copies = maps_of(features, axes, channels_last=True)
    shape, pixels = result_shape(features, target), target.numel()
    if target.dtype not in LABELS:
        raise TypeError(f"murf_fast: labels must be uint8, int16, int32 or int64 for a kernel, got {target.dtype}")
    extension.upsample_confusion(
        dtype=dtype_tag(features[0].dtype),
        maps=maps,
        grid=shape,
        bias=bias_of(bias, shape),
        target=extension.Labels(
            data=address(target, target.dtype, pixels), bytes=target.element_size(), ignore_index=ignore_index
        ),
        counts=address(counts, torch.int64, shape[1] ** 2),
        threads=_fork.threads(),
    )
