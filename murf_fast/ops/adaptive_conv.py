"""A convolution with a kernel of its own at every pixel, on a resized map that never exists."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast.ops import _checks
from murf_fast.ops._bilateral import check_reflection
from murf_fast.ops._library import empty_map, is_channels_last, register, wants_channels_last
from murf_fast.tables.folded import PADDINGS, folded_axis

MODES = ("bilinear", "bicubic")


def adaptive_conv(
    source: Tensor,
    kernels: Tensor,
    size: int | tuple[int, int] | None = None,
    *,
    mode: str | None = "bicubic",
    padding: str | None = "reflect",
    bias: Tensor | None = None,
    memory_format: torch.memory_format | None = None,
    backend: str | None = None,
) -> Tensor:
    """Apply per-pixel kernels to ``source`` resized to the kernels' grid, without resizing it.

    ``out[b, c, y, x] = bias[c] + sum_{i, j} kernels[b, i * D + j, y, x] * pad(resize(source))[b, c, y + i, x + j]``;
    one kernel for all channels, any sign, any sum. Resize and padding are folded into each kernel, ``A_y^T K A_x``:
    7 x 7 taps on a bicubic doubling read 7 x 7 pixels of the source. With ``mode=None, padding=None`` this is FeatUp's
    ``AdaptiveConv.apply(padded, filters)`` for ``kernels = filters.flatten(3).permute(0, 3, 1, 2)``, with its true
    gradients (the CUDA extension fills 7 of 49 taps of the filter gradient).

    Args:
        source: (B, C, h, w), floating point, any strides.
        kernels: (B, D * D, H, W), D odd, in the dtype of ``source`` or float32, any strides.
        size: (height, width) of the result; None or the kernels' own (H, W).
        mode: ``"bicubic"``, ``"bilinear"``, or None for a source that has the right size already.
        padding: ``"reflect"``, ``"replicate"``, ``"constant"`` (zeros), or None: the resized map is D - 1 larger.
        bias: (C,), any floating dtype.
        memory_format: Layout of the result; None means that of the source.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None chooses from the device.

    Returns:
        (B, C, H, W) in the dtype of ``source``; float32 arithmetic. Differentiable in source, kernels and bias.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: the result, and a window of source rows per thread (on CUDA folded kernels of a band of rows, about 32 MiB);
    the backward may copy its incoming gradient to channels_last.

    Source: FeatUp (arXiv 2403.10516), ``adaptive_conv_cuda``; FeatSharp.
    """
    op = "adaptive_conv"
    source, kernels = _checks.map_(op, "source", source), _checks.map_(op, "kernels", kernels)
    if kernels.shape[0] != source.shape[0]:
        raise ValueError(
            f"murf_fast.{op}: `kernels` must have the batch size of `source`, {source.shape[0]}, got {kernels.shape[0]}"
        )
    if kernels.device != source.device:
        raise ValueError(f"murf_fast.{op}: `kernels` must be on {source.device}, got {kernels.device}")
    if kernels.dtype != source.dtype and (kernels.dtype != torch.float32 or source.dtype == torch.float64):
        raise TypeError(
            f"murf_fast.{op}: `kernels` must have the dtype of `source`, {source.dtype}, or be float32 beside a half "
            f"type, got {kernels.dtype}"
        )
    # The taps are the model's, not the image's: a compiled graph is for one number of them.
    diameter = math.isqrt(operator.index(kernels.shape[1]))
    if diameter**2 != kernels.shape[1] or diameter % 2 == 0:
        raise ValueError(
            f"murf_fast.{op}: `kernels` must have D * D taps with D odd (1, 9, 25, 49, ...), got {kernels.shape[1]}"
        )
    grid = list(kernels.shape[2:])
    if size is not None and _checks.grid(op, "size", size) != grid:
        raise ValueError(f"murf_fast.{op}: `size` must be that of `kernels`, {tuple(grid)}, got {size}")
    _checks.choice(op, "mode", mode, MODES, optional=True)
    _checks.choice(op, "padding", padding, PADDINGS, optional=True)
    if mode is None:
        expected = grid if padding else [n + diameter - 1 for n in grid]
        if list(source.shape[2:]) != expected:
            raise ValueError(
                f"murf_fast.{op}: with mode=None and padding={padding!r} `source` must be {tuple(expected)} for "
                f"{diameter} x {diameter} kernels at {tuple(grid)}, got {tuple(source.shape[2:])}"
            )
    if padding == "reflect":
        check_reflection(op, diameter // 2, grid)
    if bias is not None:
        _checks.vector(op, "bias", bias, source.shape[1], source, what="one entry per channel of `source`")
    channels_last = wants_channels_last(op, memory_format, source)
    backend = backends.resolve(backend, source.device.type, source.dtype)
    if backend == "reference":
        result = reference.adaptive_conv(source, kernels, grid, bias, mode, padding)
        return result.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return torch.ops.murf_fast.adaptive_conv(source, kernels, bias, mode, padding, channels_last, backend)


def _axes(source_size, size, taps, mode, padding):
    diameter = math.isqrt(taps)
    return tuple(folded_axis(n, m, diameter, mode, padding) for n, m in zip(source_size, size, strict=True))


def _forward(source, kernels, bias, mode, padding, channels_last, backend) -> Tensor:
    out = _fake(source, kernels, bias, mode, padding, channels_last, backend)
    if out.numel():
        axes = _axes(source.shape[2:], kernels.shape[2:], kernels.shape[1], mode, padding)
        bias = None if bias is None else bias.float().contiguous()
        backends.launcher(backend).adaptive_conv(source, kernels, bias, axes, out)
    return out


def _fake(source, kernels, bias, mode, padding, channels_last, backend) -> Tensor:
    return empty_map(source, (*source.shape[:2], *kernels.shape[2:]), channels_last)


def _grad_source(grad, kernels, in_size, mode, padding, channels_last, backend) -> Tensor:
    out = _grad_source_fake(grad, kernels, in_size, mode, padding, channels_last, backend)
    if out.numel():
        axes = _axes(in_size, kernels.shape[2:], kernels.shape[1], mode, padding)
        backends.launcher(backend).adaptive_conv_backward_source(grad, kernels, axes, out)
    return out


def _grad_source_fake(grad, kernels, in_size, mode, padding, channels_last, backend) -> Tensor:
    return empty_map(grad, (*grad.shape[:2], *in_size), channels_last)


def _grad_kernels(grad, source, taps, mode, padding, dtype, backend) -> Tensor:
    out = _grad_kernels_fake(grad, source, taps, mode, padding, dtype, backend)
    if out.numel():
        axes = _axes(source.shape[2:], grad.shape[2:], taps, mode, padding)
        backends.launcher(backend).adaptive_conv_backward_kernels(grad, source, axes, out)
    return out


def _grad_kernels_fake(grad, source, taps, mode, padding, dtype, backend) -> Tensor:
    return empty_map(grad, (grad.shape[0], taps, *grad.shape[2:]), True, dtype)


def _forward_mode(args, tangents) -> Tensor:
    """Linear in source and bias together, and in the kernels."""
    source, kernels, _, *rule = args
    of_source, of_kernels, of_bias, *_ = tangents
    op, parts = torch.ops.murf_fast.adaptive_conv, []
    if of_source is not None or of_bias is not None:
        parts.append(op(torch.zeros_like(source) if of_source is None else of_source, kernels, of_bias, *rule))
    if of_kernels is not None:
        parts.append(op(source, of_kernels, None, *rule))
    return sum(parts[1:], parts[0])


def _setup_context(ctx, inputs, output) -> None:
    source, kernels, bias, ctx.mode, ctx.padding, _, ctx.backend = inputs
    ctx.save_for_backward(source, kernels)
    ctx.channels_last = is_channels_last(source)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    source, kernels = ctx.saved_tensors
    needs_source, needs_kernels, needs_bias = ctx.needs_input_grad[:3]
    grad_source = grad_kernels = grad_bias = None
    if needs_source:
        grad_source = torch.ops.murf_fast.adaptive_conv_backward_source(
            grad, kernels, source.shape[2:], ctx.mode, ctx.padding, ctx.channels_last, ctx.backend
        )
    if needs_kernels:
        grad_kernels = torch.ops.murf_fast.adaptive_conv_backward_kernels(
            grad, source, kernels.shape[1], ctx.mode, ctx.padding, kernels.dtype, ctx.backend
        )
    if needs_bias:
        grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
    return grad_source, grad_kernels, grad_bias, None, None, None, None


def _bilinear(op: str) -> Callable:
    """Forward mode of an op that is linear in each of its two first arguments."""

    def forward_mode(args, tangents) -> Tensor:
        (first, second, *rest), call = args, getattr(torch.ops.murf_fast, op)
        parts = [] if tangents[0] is None else [call(tangents[0], second, *rest)]
        parts += [] if tangents[1] is None else [call(first, tangents[1], *rest)]
        return sum(parts[1:], parts[0])

    return forward_mode


def _gradient_context(ctx, inputs, output) -> None:
    grad, other, _, ctx.mode, ctx.padding, _, ctx.backend = inputs
    ctx.save_for_backward(grad, other)
    ctx.layouts = (is_channels_last(grad), is_channels_last(other))


def _grad_source_backward(ctx, direction):
    """The three ops are the derivatives of one trilinear form: of each other."""
    grad, kernels = ctx.saved_tensors
    ops, of_grad, of_kernels = torch.ops.murf_fast, None, None
    if ctx.needs_input_grad[0]:
        of_grad = ops.adaptive_conv(direction, kernels, None, ctx.mode, ctx.padding, ctx.layouts[0], ctx.backend)
    if ctx.needs_input_grad[1]:
        of_kernels = ops.adaptive_conv_backward_kernels(
            grad, direction, kernels.shape[1], ctx.mode, ctx.padding, kernels.dtype, ctx.backend
        )
    return of_grad, of_kernels, None, None, None, None, None


def _grad_kernels_backward(ctx, direction):
    grad, source = ctx.saved_tensors
    ops, of_grad, of_source = torch.ops.murf_fast, None, None
    if ctx.needs_input_grad[0]:
        of_grad = ops.adaptive_conv(source, direction, None, ctx.mode, ctx.padding, ctx.layouts[0], ctx.backend)
    if ctx.needs_input_grad[1]:
        of_source = ops.adaptive_conv_backward_source(
            grad, direction, source.shape[2:], ctx.mode, ctx.padding, ctx.layouts[1], ctx.backend
        )
    return of_grad, of_source, None, None, None, None, None


register(
    "adaptive_conv(Tensor source, Tensor kernels, Tensor? bias, str? interpolation, str? padding, bool channels_last, "
    "str backend) -> Tensor",
    _forward,
    _fake,
    _backward,
    _setup_context,
    _forward_mode,
)
register(
    "adaptive_conv_backward_source(Tensor grad, Tensor kernels, SymInt[] in_size, str? interpolation, str? padding, "
    "bool channels_last, str backend) -> Tensor",
    _grad_source,
    _grad_source_fake,
    _grad_source_backward,
    _gradient_context,
    _bilinear("adaptive_conv_backward_source"),
)
register(
    "adaptive_conv_backward_kernels(Tensor grad, Tensor source, SymInt taps, str? interpolation, str? padding, "
    "ScalarType kernels_dtype, str backend) -> Tensor",
    _grad_kernels,
    _grad_kernels_fake,
    _grad_kernels_backward,
    _gradient_context,
    _bilinear("adaptive_conv_backward_kernels"),
)
