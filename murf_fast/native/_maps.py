"""Low-resolution maps, their bias and their gradients, as the kernels that resample them take them."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast.native._address import address, no_memory, refuse, same_shape
from murf_fast.tables.resize import AxisTable

Axes = list[tuple[AxisTable, AxisTable]]


class Maps:
    """The extension's view of low-resolution maps; keeps copies alive until the call is over."""

    def __init__(self, features: list[Tensor], axes: Axes, channels_last: bool):
        walkable = channels_contiguous if channels_last else rows_contiguous
        self.tensors = [walkable(f) for f in features]
        self.dtype = dtype = features[0].dtype
        self.tuples = []
        for f, (y, x) in zip(self.tensors, axes, strict=True):
            if f.dtype is not dtype or not f.is_cpu:
                refuse(f, dtype, "any")
            self.tuples.append((f.data_ptr() or no_memory(f), f.shape, f.stride(), y.native, x.native))


def channels_contiguous(x: Tensor) -> Tensor:
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def is_channels_last(out: Tensor) -> bool:
    return not out.is_contiguous()


def result_shape(features: list[Tensor], full: Tensor) -> tuple[int, int, int, int]:
    batch, height, width = full.shape
    return batch, features[0].shape[1], height, width


def bias_of(bias: Tensor | None, shape: tuple[int, ...]) -> tuple[int, int]:
    """Address and batch stride of (1, C) or (B, C) for a result of this shape."""
    if bias is None:
        return 0, 0
    rows, channels = bias.shape
    if channels != shape[1] or (rows != 1 and rows != shape[0]):
        refuse(bias, torch.float32, f"(1, {shape[1]}) or ({shape[0]}, {shape[1]})")
    return address(bias, torch.float32, 0), channels if rows > 1 else 0


def pixel_gradients(features: list[Tensor], gradients: list[Tensor]) -> list[int]:
    """float32 gradients of maps, channels_last as the kernels write them."""
    for feature, gradient in zip(features, gradients, strict=True):
        same_shape(gradient, feature.shape)
    return [address(g.permute(0, 2, 3, 1), torch.float32, 0) for g in gradients]
