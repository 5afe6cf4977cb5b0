"""Low-resolution maps, their bias and their gradients, as the kernels that resample them take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from murf_fast.native._address import address, extension, no_memory, refuse, same_shape
from murf_fast.tables.resize import AxisTable

Axes = list[tuple[AxisTable, AxisTable]]

_NO_BIAS = extension.Bias(data=0, stride_b=0)


def maps_of(features: list[Tensor], axes: Axes, channels_last: bool) -> tuple[list[Any], list[Tensor]]:
    """Maps of one dtype with their tables; and copies of those whose strides a kernel cannot walk, to be held until its
    call is over.
    """
    dtype, maps, copies = features[0].dtype, [], []
    contiguous = 1 if channels_last else 3
    for f, (y, x) in zip(features, axes, strict=True):
        shape, strides = f.shape, f.stride()
        if strides[contiguous] != 1 and shape[contiguous] != 1:
            f = f.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            strides = f.stride()
            copies.append(f)
        if f.dtype is not dtype or not f.is_cpu:
            refuse(f, dtype, "any")
        data = f.data_ptr() or no_memory(f)
        maps.append(extension.Map(data=data, shape=shape, strides=strides, y=y.native, x=x.native))
    return maps, copies


def result_shape(features: list[Tensor], full: Tensor) -> tuple[int, int, int, int]:
    batch, height, width = full.shape
    return batch, features[0].shape[1], height, width


def bias_of(bias: Tensor | None, shape: tuple[int, ...]) -> Any:
    """A bias (1, C) or (B, C) for a result of this shape."""
    if bias is None:
        return _NO_BIAS
    rows, channels = bias.shape
    if channels != shape[1] or (rows != 1 and rows != shape[0]):
        refuse(bias, torch.float32, f"(1, {shape[1]}) or ({shape[0]}, {shape[1]})")
    return extension.Bias(data=address(bias, torch.float32, 0), stride_b=channels if rows > 1 else 0)


def pixel_gradients(features: list[Tensor], gradients: list[Tensor]) -> list[int]:
    """float32 gradients of maps, channels_last as the kernels write them."""
    for feature, gradient in zip(features, gradients, strict=True):
        same_shape(gradient, feature.shape)
    return [address(g.permute(0, 2, 3, 1), torch.float32, 0) for g in gradients]
