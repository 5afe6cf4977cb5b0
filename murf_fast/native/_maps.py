"""Low-resolution maps, their bias and their gradients, as the kernels that resample them take them."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast.native._address import address, extension, no_memory, refuse, same_shape
from murf_fast.tables.resize import AxisTable

Axes = list[tuple[AxisTable, AxisTable]]

_NO_BIAS = extension.Bias(data=0, stride_b=0)


def walkable(features: list[Tensor], channels_last: bool) -> list[Tensor]:
    """The maps, or copies whose strides a kernel can walk; to be held until its call is over."""
    return [channels_contiguous(f) if channels_last else _rows_contiguous(f) for f in features]


def channels_contiguous(x: Tensor) -> Tensor:
    if x.stride()[1] == 1 or x.shape[1] == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride()[3] == 1 or x.shape[3] == 1 else x.contiguous()


def maps_of(features: list[Tensor], axes: Axes) -> list:
    """Maps of one dtype with their tables."""
    dtype, maps = features[0].dtype, []
    for f, (y, x) in zip(features, axes, strict=True):
        if f.dtype is not dtype or not f.is_cpu:
            refuse(f, dtype, "any")
        data = f.data_ptr() or no_memory(f)
        maps.append(extension.Map(data=data, shape=f.shape, strides=f.stride(), y=y.native, x=x.native))
    return maps


def result_shape(features: list[Tensor], full: Tensor) -> tuple[int, int, int, int]:
    batch, height, width = full.shape
    return batch, features[0].shape[1], height, width


def bias_of(bias: Tensor | None, shape: tuple[int, ...]):
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
