"""A convolution with a kernel of its own at every pixel, on a resized map that never exists."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast._layout import is_channels_last
from murf_fast.annotations import Backend, Padding, Size, SmoothMode
from murf_fast.ops import _checks, _contract
from murf_fast.ops._bilateral import check_reflection
from murf_fast.ops._dtypes import BY_NAME, NAMES
from murf_fast.ops._library import (
    as_float32,
    bias_gradient,
    empty_map,
    layout_of,
    register,
    wants_channels_last,
)
from murf_fast.tables.folded import PADDINGS, folded_axis

MODES = ("bilinear", "bicubic")


def adaptive_conv(
    source: Tensor,
    kernels: Tensor,
    size: Size | None = None,
    *,
    mode: SmoothMode | None = "bicubic",
    padding: Padding | None = "reflect",
    bias: Tensor | None = None,
    memory_format: torch.memory_format | None = None,
    backend: Backend | None = None,
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
    _checks.companion(op, "kernels", kernels, "source", source)
    # The taps are the model's, not the image's: a compiled graph is for one number of them.
    diameter = _diameter(op, operator.index(kernels.shape[1]))
    grid = tuple(kernels.shape[2:])
    if size is not None and _checks.grid(op, "size", size) != grid:
        raise ValueError(f"murf_fast.{op}: `size` must be that of `kernels`, {grid}, got {size}")
    _checks.choice(op, "mode", mode, MODES, optional=True)
    _checks.choice(op, "padding", padding, PADDINGS, optional=True)
    if mode is None:
        expected = _unresized(grid, diameter, padding)
        if tuple(source.shape[2:]) != expected:
            raise ValueError(
                f"murf_fast.{op}: with mode=None and padding={padding!r} `source` must be {expected} for "
                f"{diameter} x {diameter} kernels at {grid}, got {tuple(source.shape[2:])}"
            )
    if padding == "reflect":
        check_reflection(op, diameter // 2, grid)
    if bias is not None:
        _checks.vector(op, "bias", bias, source.shape[1], source, what="one entry per channel of `source`")
    channels_last = wants_channels_last(op, memory_format, source)
    backend = _checks.backend(backend, source)
    if backend == "reference":
        return _reference(source, kernels, bias, mode, padding, channels_last, backend)
    return _adaptive_conv(source, kernels, bias, mode, padding, channels_last, backend)


def _unresized(grid, diameter: int, padding: str | None) -> tuple[int, ...]:
    """The size of a source that is not resized."""
    return tuple(grid) if padding else tuple(n + diameter - 1 for n in grid)


def _diameter(op: str, taps: int) -> int:
    diameter = math.isqrt(max(taps, 0))
    if diameter**2 != taps or diameter % 2 == 0:
        raise ValueError(f"murf_fast.{op}: `kernels` must have D * D taps with D odd (1, 9, 25, 49, ...), got {taps}")
    return diameter


def _require_windows(op: str, source, grid, taps: int, mode, padding) -> None:
    """Sizes with which the tables read no pixel outside the source."""
    diameter = _diameter(op, taps)
    _contract.one_of(op, "interpolation", mode, (None, *MODES))
    _contract.one_of(op, "padding", padding, (None, *PADDINGS))
    _contract.grid(op, "source's size", source)
    if padding == "reflect":
        check_reflection(op, diameter // 2, grid)
    expected = _unresized(grid, diameter, padding)
    if mode is None and tuple(source) != expected:
        raise ValueError(f"murf_fast.{op}: without a resize the source must be {expected}, got {tuple(source)}")


def _axes(source_size, size, taps, mode, padding):
    diameter = math.isqrt(taps)
    return tuple(folded_axis(n, m, diameter, mode, padding) for n, m in zip(source_size, size, strict=True))


def _requires(op, source, kernels, bias, mode, padding, channels_last, backend) -> None:
    _contract.map_(op, "source", source, backend)
    _contract.map_(op, "kernels", kernels)
    dtypes = (source.dtype, torch.float32)
    _contract.tensor(op, "kernels", kernels, source, (source.shape[0], None, None, None), dtypes)
    _require_windows(op, source.shape[2:], kernels.shape[2:], kernels.shape[1], mode, padding)
    if bias is not None:
        _contract.tensor(op, "bias", bias, source, (source.shape[1],), _checks.DTYPES)


def _empty(source, kernels, bias, mode, padding, channels_last, backend) -> Tensor:
    return empty_map(source, (*source.shape[:2], *kernels.shape[2:]), channels_last)


def _launch(source, kernels, bias, mode, padding, channels_last, backend, out) -> None:
    axes = _axes(source.shape[2:], kernels.shape[2:], kernels.shape[1], mode, padding)
    backends.launcher(backend).adaptive_conv(source, kernels, as_float32(bias), axes, out)


def _reference(source, kernels, bias, mode, padding, channels_last, backend) -> Tensor:
    result = reference.adaptive_conv(source, kernels, tuple(kernels.shape[2:]), bias, mode, padding)
    return result.contiguous(memory_format=layout_of(channels_last))


def _source_requires(op, grad, kernels, in_size, mode, padding, channels_last, backend) -> None:
    _contract.map_(op, "grad", grad, backend)
    _contract.map_(op, "kernels", kernels)
    shape = (grad.shape[0], None, *grad.shape[2:])
    _contract.tensor(op, "kernels", kernels, grad, shape, (grad.dtype, torch.float32))
    _contract.count(op, "in_size", in_size, 2)
    _require_windows(op, in_size, grad.shape[2:], kernels.shape[1], mode, padding)


def _source_empty(grad, kernels, in_size, mode, padding, channels_last, backend) -> Tensor:
    return empty_map(grad, (*grad.shape[:2], *in_size), channels_last)


def _source_launch(grad, kernels, in_size, mode, padding, channels_last, backend, out) -> None:
    axes = _axes(in_size, kernels.shape[2:], kernels.shape[1], mode, padding)
    backends.launcher(backend).adaptive_conv_backward_source(grad, kernels, axes, out)


def _kernels_requires(op, grad, source, taps, mode, padding, dtype, backend) -> None:
    _contract.map_(op, "grad", grad, backend)
    _contract.map_(op, "source", source)
    _contract.tensor(op, "source", source, grad, (*grad.shape[:2], None, None), (grad.dtype,))
    _require_windows(op, source.shape[2:], grad.shape[2:], taps, mode, padding)
    _contract.one_of(op, "kernels_dtype", dtype, (NAMES[grad.dtype], "float32"))


def _kernels_empty(grad, source, taps, mode, padding, dtype, backend) -> Tensor:
    return empty_map(grad, (grad.shape[0], taps, *grad.shape[2:]), True, BY_NAME[dtype])


def _kernels_launch(grad, source, taps, mode, padding, dtype, backend, out) -> None:
    axes = _axes(source.shape[2:], grad.shape[2:], taps, mode, padding)
    backends.launcher(backend).adaptive_conv_backward_kernels(grad, source, axes, out)


def _partial(name: str, tensors: dict[str, Tensor], mode, padding, backend) -> Tensor:
    """The derivative of ``sum(grad * adaptive_conv(source, kernels))`` by one of the three.

    The form is linear in each, so the three ops are the derivatives of each other.
    """
    grad, source, kernels = tensors["grad"], tensors["source"], tensors["kernels"]
    channels_last = is_channels_last(tensors[name])
    if name == "grad":
        return _adaptive_conv(source, kernels, None, mode, padding, channels_last, backend)
    if name == "source":
        return _grad_source(grad, kernels, source.shape[2:], mode, padding, channels_last, backend)
    return _grad_kernels(grad, source, kernels.shape[1], mode, padding, NAMES[kernels.dtype], backend)


def _derivatives(op: str, result: str, first: str, second: str) -> dict[str, Any]:
    """Backward and forward mode of the op that makes ``result`` from the other two.

    The third argument is a bias, which is added to what the source gives, or a size.
    """

    def backward(wanted, arguments, direction):
        a, b, bias, mode, padding, _, backend = arguments
        tensors, how = {first: a, second: b, result: direction}, (mode, padding, backend)
        return (
            _partial(first, tensors, *how) if wanted[0] else None,
            _partial(second, tensors, *how) if wanted[1] else None,
            bias_gradient(direction, bias) if wanted[2] else None,
        )

    def forward_mode(args, tangents) -> Tensor:
        a, b, third, *rest = args
        of_a, of_b, of_bias = tangents[:3]
        call, has_bias, parts = getattr(torch.ops.murf_fast, op), result == "grad", []
        if of_a is not None or of_bias is not None:
            of_a = torch.zeros_like(a) if of_a is None else of_a
            parts.append(call(of_a, b, of_bias if has_bias else third, *rest))
        if of_b is not None:
            parts.append(call(a, of_b, None if has_bias else third, *rest))
        return sum(parts[1:], parts[0])

    return {"backward": backward, "forward_mode": forward_mode}


_adaptive_conv = register(
    "adaptive_conv(Tensor source, Tensor kernels, Tensor? bias, str? interpolation, str? padding, bool channels_last, "
    "str backend) -> Tensor",
    _requires,
    _empty,
    _launch,
    **_derivatives("adaptive_conv", "grad", "source", "kernels"),
    reference=_reference,
    checked=True,
)
_grad_source = register(
    "adaptive_conv_backward_source(Tensor grad, Tensor kernels, SymInt[] in_size, str? interpolation, str? padding, "
    "bool channels_last, str backend) -> Tensor",
    _source_requires,
    _source_empty,
    _source_launch,
    **_derivatives("adaptive_conv_backward_source", "source", "grad", "kernels"),
)
_grad_kernels = register(
    "adaptive_conv_backward_kernels(Tensor grad, Tensor source, SymInt taps, str? interpolation, str? padding, "
    "str kernels_dtype, str backend) -> Tensor",
    _kernels_requires,
    _kernels_empty,
    _kernels_launch,
    **_derivatives("adaptive_conv_backward_kernels", "kernels", "grad", "source"),
)
