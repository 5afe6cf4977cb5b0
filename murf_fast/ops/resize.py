"""One map resized, and the adjoint that every gradient of the resize ops is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast.ops import _checks
from murf_fast.ops._derivatives import linear
from murf_fast.ops._library import axes_of, empty_map, is_channels_last, register, wants_channels_last
from murf_fast.tables.resize import MAX_PIXELS, scaled_size


def resize(
    x: Tensor,
    size: int | tuple[int, int] | None = None,
    *,
    scale_factor: float | tuple[float, float] | None = None,
    mode: str = "bilinear",
    antialias: bool = False,
    via: int | tuple[int, int] | None = None,
    memory_format: torch.memory_format | None = None,
    backend: str | None = None,
) -> Tensor:
    """Resize one map: ``F.interpolate(align_corners=False)`` in every mode the field uses, and its exact adjoint.

    ``out = U_h x U_w^T``. With ``size`` the sampling step is ``in / out``; with ``scale_factor=f`` the result has
    ``floor(in * f)`` pixels and the step is ``1 / f``: the two differ whenever ``in * f`` is not an integer. An axis
    that keeps its size is copied by ``"bilinear"`` and the antialiased modes whatever the factor, as by torch.

    Where rounding decides what a nearest mode reads, and in what ``"nearest"`` makes of a factor on an axis that it
    keeps or doubles, results are those of torch's CPU kernels for contiguous maps, in every layout (see
    :mod:`murf_fast.tables.resize`). Antialiased results of one column are the right ones, which torch gives for
    channels_last maps only.

    Args:
        x: (B, C, h, w), floating point, any strides.
        size: (height, width) in pixels; one integer means a square. Exactly one of ``size`` and ``scale_factor``.
        scale_factor: Output pixels per input pixel, per axis or for both.
        mode, antialias: As for :func:`upsample_concat`. ``"area"`` is adaptive average pooling.
        via: An intermediate grid (only with ``size``); the two resizes are composed into one.
        memory_format: Layout of the result; None follows ``x``.
        backend: As for :func:`upsample_concat`.

    Returns:
        (B, C, height, width) in the dtype of ``x``. Twice differentiable.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        BackendUnavailableError: ``backend`` cannot take this call.

    Memory: the result, and a few rows per thread.

    Source: ``torch.nn.functional.interpolate`` and ``adaptive_avg_pool2d``.
    """
    op = "resize"
    _checks.map_(op, "x", x)
    _checks.mode(op, mode, antialias)
    if (size is None) == (scale_factor is None):
        raise ValueError(f"murf_fast.{op}: exactly one of `size` and `scale_factor` must be given")
    factors: list[float] | None = None
    if scale_factor is not None:
        if via is not None:
            raise ValueError(f"murf_fast.{op}: `via` needs `size`, got `scale_factor`")
        factors = _factors(op, scale_factor)
        size = (scaled_size(x.shape[2], factors[0]), scaled_size(x.shape[3], factors[1]))
        if min(size) < 1:
            raise ValueError(
                f"murf_fast.{op}: `scale_factor` {scale_factor!r} leaves no pixel of a map of {tuple(x.shape[2:])}"
            )
        if mode == "area":
            factors = None  # adaptive pooling knows only sizes
    size = _checks.grid(op, "size" if scale_factor is None else "scale_factor", size)
    via = _checks.optional_grid(op, "via", via)
    channels_last = wants_channels_last(op, memory_format, x)
    backend = backends.resolve(backend, x.device.type, x.dtype)
    if backend == "reference":
        result = reference.resize(x, size, mode, antialias, via, factors)
        return result.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return torch.ops.murf_fast.resize(x, size, mode, antialias, via, factors, channels_last, backend)


def _factors(op: str, scale_factor: object) -> list[float]:
    given = scale_factor if _checks.is_sequence(scale_factor) else (scale_factor, scale_factor)
    factors = _checks.numbers(op, "scale_factor", given, 2)
    if not all(0 < f <= MAX_PIXELS for f in factors):
        raise ValueError(f"murf_fast.{op}: `scale_factor` must be one or two positive numbers, got {scale_factor!r}")
    return factors


def _forward(x, size, mode, antialias, via, scale_factor, channels_last, backend) -> Tensor:
    out = empty_map(x, (x.shape[0], x.shape[1], *size), channels_last)
    _launch(x, mode, antialias, via, scale_factor, out, backend)
    return out


def _launch(x, mode, antialias, via, scale_factor, out, backend) -> None:
    if out.numel():
        axes = axes_of(x.shape[2], x.shape[3], out.shape[2:], mode, antialias, via, scale_factor)
        backends.launcher(backend).upsample_sum([x], [axes], None, out)


def _fake(x, size, mode, antialias, via, scale_factor, channels_last, backend) -> Tensor:
    return empty_map(x, (x.shape[0], x.shape[1], *size), channels_last)


def _setup_context(ctx, inputs, output) -> None:
    x, _, ctx.mode, ctx.antialias, ctx.via, ctx.scale_factor, _, ctx.backend = inputs
    ctx.in_size, ctx.channels_last = x.shape[2:], is_channels_last(x)


def _backward(ctx, grad):
    gradient = torch.ops.murf_fast.resize_adjoint(
        grad, ctx.in_size, ctx.mode, ctx.antialias, ctx.via, ctx.scale_factor, ctx.channels_last, ctx.backend
    )
    return gradient, None, None, None, None, None, None, None


def _adjoint(grad, in_size, mode, antialias, via, scale_factor, channels_last, backend) -> Tensor:
    out = empty_map(grad, (grad.shape[0], grad.shape[1], *in_size), channels_last)
    if out.numel():
        axes = axes_of(*in_size, grad.shape[2:], mode, antialias, via, scale_factor)
        backends.launcher(backend).resize_adjoint(grad, axes, out)
    return out


def _adjoint_fake(grad, in_size, mode, antialias, via, scale_factor, channels_last, backend) -> Tensor:
    return empty_map(grad, (grad.shape[0], grad.shape[1], *in_size), channels_last)


def _adjoint_setup_context(ctx, inputs, output) -> None:
    grad, _, ctx.mode, ctx.antialias, ctx.via, ctx.scale_factor, _, ctx.backend = inputs
    ctx.size, ctx.channels_last = grad.shape[2:], is_channels_last(grad)


def _adjoint_backward(ctx, x):
    result = torch.ops.murf_fast.resize(
        x, ctx.size, ctx.mode, ctx.antialias, ctx.via, ctx.scale_factor, ctx.channels_last, ctx.backend
    )
    return result, None, None, None, None, None, None, None


register(
    "resize(Tensor x, SymInt[] size, str interpolation, bool antialias, SymInt[]? via, float[]? scale_factor, "
    "bool channels_last, str backend) -> Tensor",
    _forward,
    _fake,
    _backward,
    _setup_context,
    linear("resize", 0),
)
# Into a part of a larger buffer; for callers within the library, where no gradients are needed.
register(
    "resize_out(Tensor x, str interpolation, bool antialias, SymInt[]? via, float[]? scale_factor, Tensor(a!) out, "
    "str backend) -> ()",
    _launch,
    lambda x, mode, antialias, via, scale_factor, out, backend: None,
)
register(
    "resize_adjoint(Tensor grad, SymInt[] in_size, str interpolation, bool antialias, SymInt[]? via, "
    "float[]? scale_factor, bool channels_last, str backend) -> Tensor",
    _adjoint,
    _adjoint_fake,
    _adjoint_backward,
    _adjoint_setup_context,
    linear("resize_adjoint", 0),
)
