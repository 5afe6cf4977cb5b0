"""A convolution with a kernel of its own for every pixel, through the composed window."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import address, dtype_tag, extension, prefer_huge_pages, strided
from murf_fast.tables.folded import FoldedAxis

__all__ = ["adaptive_conv", "adaptive_conv_backward_kernels", "adaptive_conv_backward_source"]

Axes = tuple[FoldedAxis, FoldedAxis]


def adaptive_conv(source: Tensor, kernels: Tensor, bias: Tensor | None, axes: Axes, out: Tensor) -> None:
    """``out = bias + sum of folded kernels times source pixels``: source (B, C, h, w), kernels (B, D * D, H, W), bias
    (C,) float32, result (B, C, H, W); any strides.
    """
    adaptive_conv_band(source, kernels, bias, axes, out, (0, axes[0].out_size))


def adaptive_conv_band(
    source: Tensor, kernels: Tensor, bias: Tensor | None, axes: Axes, out: Tensor, rows: tuple[int, int]
) -> None:
    """The band ``rows``, (begin, end), of ``out``, whose kernels are all that ``kernels`` holds."""
    prefer_huge_pages(out)
    (batch, channels), (y, x) = source.shape[:2], axes
    begin, end = rows
    extension.adaptive_conv(
        dtype=dtype_tag(source.dtype),
        kernels_dtype=dtype_tag(kernels.dtype),
        conv=extension.AdaptiveConv(batch=batch, channels=channels, y=y.native, x=x.native, rows=rows),
        source=strided(source, source.dtype, (batch, channels, y.in_size, x.in_size)),
        kernels=strided(kernels, kernels_dtype(kernels, source), (batch, y.taps * x.taps, end - begin, x.out_size)),
        bias=address(bias, torch.float32, channels),
        out=strided(out, source.dtype, (batch, channels, y.out_size, x.out_size)),
        threads=_fork.threads(),
    )


def adaptive_conv_backward_source(grad: Tensor, kernels: Tensor, axes: Axes, out: Tensor) -> None:
    """``out`` (B, C, h, w) gathers, for every pixel of the source, the gradients of the outputs that read it."""
    if grad.stride(1) != 1 and grad.shape[1] != 1:  # its pixels are read once for every source row of their windows
        grad = grad.contiguous(memory_format=torch.channels_last)
    (batch, channels), (y, x) = grad.shape[:2], axes
    extension.adaptive_conv_backward_source(
        dtype=dtype_tag(grad.dtype),
        kernels_dtype=dtype_tag(kernels.dtype),
        conv=extension.AdaptiveConv(batch=batch, channels=channels, y=y.native, x=x.native, rows=(0, y.out_size)),
        grad=strided(grad, grad.dtype, (batch, channels, y.out_size, x.out_size)),
        kernels=strided(kernels, kernels_dtype(kernels, grad), (batch, y.taps * x.taps, y.out_size, x.out_size)),
        out=strided(out, grad.dtype, (batch, channels, y.in_size, x.in_size)),
        threads=_fork.threads(),
    )


def adaptive_conv_backward_kernels(grad: Tensor, source: Tensor, axes: Axes, out: Tensor) -> None:
    """``out`` (B, D * D, H, W): products of gradients with the source pixels that a tap reads."""
    (batch, channels), (y, x) = grad.shape[:2], axes
    extension.adaptive_conv_backward_kernels(
        dtype=dtype_tag(source.dtype),
        kernels_dtype=dtype_tag(out.dtype),
        conv=extension.AdaptiveConv(batch=batch, channels=channels, y=y.native, x=x.native, rows=(0, y.out_size)),
        grad=strided(grad, source.dtype, (batch, channels, y.out_size, x.out_size)),
        source=strided(source, source.dtype, (batch, channels, y.in_size, x.in_size)),
        out=strided(out, kernels_dtype(out, source), (batch, y.taps * x.taps, y.out_size, x.out_size)),
        threads=_fork.threads(),
    )


def kernels_dtype(kernels: Tensor, maps: Tensor) -> torch.dtype:
    """Kernels have the dtype of the maps or are float32."""
    return torch.float32 if kernels.dtype is torch.float32 else maps.dtype
