"""``U^T U`` of a resize applied to a map: second moments of the resized map without resizing it. Internal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast.ops._derivatives import linear
from murf_fast.ops._library import empty_map, is_channels_last, register
from murf_fast.tables.resize import gram_axis, is_large


def resize_gram(x: Tensor, size: Sequence[int], mode: str, antialias: bool, backend: str) -> Tensor:
    """``G_h x G_w`` with ``G = U^T U`` of the resize from the grid of ``x`` (B, C, h, w) to ``size``.

    ``<x, resize_gram(x)>`` is the squared norm of the resized map, and since the rows of ``U`` sum to one, the result
    for a map of ones holds the weight of every low-resolution pixel in the sum of the resized map.

    Memory: the result. Symmetric: its own adjoint. Source: identity I6 (a batch norm's statistics at low resolution).
    """
    if backend == "reference":
        return reference.resize_gram(x, size, mode, antialias)
    return torch.ops.murf_fast.resize_gram(x, size, mode, antialias, backend)


def _forward(x, size, mode, antialias, backend) -> Tensor:
    out = _fake(x, size, mode, antialias, backend)
    if out.numel():
        large = is_large(mode, size)
        axes = tuple(gram_axis(n, m, mode, antialias, None, large) for n, m in zip(x.shape[2:], size, strict=True))
        backends.launcher(backend).upsample_sum([x], [axes], None, out)
    return out


def _fake(x, size, mode, antialias, backend) -> Tensor:
    return empty_map(x, x.shape, is_channels_last(x))


def _setup_context(ctx, inputs, output) -> None:
    _, ctx.size, ctx.mode, ctx.antialias, ctx.backend = inputs


def _backward(ctx, grad):
    gradient = torch.ops.murf_fast.resize_gram(grad, ctx.size, ctx.mode, ctx.antialias, ctx.backend)
    return gradient, None, None, None, None


register(
    "resize_gram(Tensor x, SymInt[] size, str interpolation, bool antialias, str backend) -> Tensor",
    _forward,
    _fake,
    _backward,
    _setup_context,
    linear("resize_gram", 0),
)
