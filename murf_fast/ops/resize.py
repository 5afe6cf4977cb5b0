"""One map resized, and the adjoint that every gradient of the resize ops is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast.annotations import Backend, Mode, Size
from murf_fast.ops import _checks, _contract
from murf_fast.ops._derivatives import linear
from murf_fast.ops._library import axes_of, empty_map, layout_of, register, wants_channels_last, written
from murf_fast.tables.resize import MAX_PIXELS, scaled_size


def resize(
    x: Tensor,
    size: Size | None = None,
    *,
    scale_factor: float | tuple[float, float] | None = None,
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: Size | None = None,
    memory_format: torch.memory_format | None = None,
    backend: Backend | None = None,
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
    factors, name = None, "size"
    if size is None or scale_factor is not None:
        _checks.mode(op, mode, antialias)
        size, factors = _scaled(op, x, size, scale_factor, mode, via)
        name = "scale_factor"
    how = _checks.resize(op, size, mode, antialias, via, name=name)
    channels_last = wants_channels_last(op, memory_format, x)
    backend = _checks.backend(backend, x)
    if backend == "reference":
        return _reference(x, how, factors, channels_last, backend)
    return _resize(x, how, factors, channels_last, backend)


def _scaled(op: str, x: Tensor, size: object, scale_factor: object, mode: str, via: object) -> tuple[Any, ...]:
    """The size that a factor gives, and the factors by axis; None for ``"area"``, which knows only sizes."""
    if (size is None) == (scale_factor is None):
        raise ValueError(f"murf_fast.{op}: exactly one of `size` and `scale_factor` must be given")
    if via is not None:
        raise ValueError(f"murf_fast.{op}: `via` needs `size`, got `scale_factor`")
    factors = _factors(op, scale_factor)
    size = (scaled_size(x.shape[2], factors[0]), scaled_size(x.shape[3], factors[1]))
    if min(size) < 1:
        raise ValueError(
            f"murf_fast.{op}: `scale_factor` {scale_factor!r} leaves no pixel of a map of {tuple(x.shape[2:])}"
        )
    return size, None if mode == "area" else factors


def _factors(op: str, scale_factor: object) -> list[float]:
    given = scale_factor if _checks.is_sequence(scale_factor) else (scale_factor, scale_factor)
    factors = _checks.numbers(op, "scale_factor", given, 2)
    if not all(0 < f <= MAX_PIXELS for f in factors):
        raise ValueError(f"murf_fast.{op}: `scale_factor` must be one or two positive numbers, got {scale_factor!r}")
    return factors


def _requires(op, x, how, factors, channels_last, backend) -> None:
    _contract.map_(op, "x", x, backend)
    _contract.resize(op, how)
    _contract.factors(op, factors, x.shape[2:], how.size)


def _empty(x, how, factors, channels_last, backend) -> Tensor:
    return empty_map(x, (*x.shape[:2], *how.size), channels_last)


def _launch(x, how, factors, channels_last, backend, out) -> None:
    backends.launcher(backend).upsample_sum([x], [_axes(x.shape[2:], how, factors)], None, out)


def _reference(x, how, factors, channels_last, backend) -> Tensor:
    return reference.resize(x, *how, factors).contiguous(memory_format=layout_of(channels_last))


def _axes(in_size, how, factors):
    return axes_of(*in_size, *how, None if factors is None else tuple(factors))


def _backward(wanted, arguments, grad):
    x, how, factors, _, backend = arguments
    return (resize_adjoint(grad, x.shape[2:], how, factors, x.channels_last, backend),)


def _gradient_requires(op, grad, in_size, how, factors, channels_last, backend) -> None:
    _contract.map_(op, "grad", grad, backend)
    _contract.grid(op, "in_size", in_size)
    _contract.resize(op, how)
    _contract.factors(op, factors, in_size, grad.shape[2:])


def _gradient_empty(grad, in_size, how, factors, channels_last, backend) -> Tensor:
    return empty_map(grad, (*grad.shape[:2], *in_size), channels_last)


def _gradient_launch(grad, in_size, how, factors, channels_last, backend, out) -> None:
    axes = _axes(in_size, how._replace(size=tuple(grad.shape[2:])), factors)
    backends.launcher(backend).resize_adjoint(grad, axes, out)


def _gradient_backward(wanted, arguments, x):
    grad, _, how, factors, _, backend = arguments
    return (_resize(x, how._replace(size=tuple(grad.shape[2:])), factors, grad.channels_last, backend),)


_resize = register(
    "resize(Tensor x, SymInt[] size, str interpolation, bool antialias, SymInt[]? via, float[]? scale_factor, "
    "bool channels_last, str backend) -> Tensor",
    _requires,
    _empty,
    _launch,
    _backward,
    keeps=False,
    forward_mode=linear("resize", 0),
    reference=_reference,
    onnx=True,
    checked=True,
)
resize_adjoint = register(
    "resize_adjoint(Tensor grad, SymInt[] in_size, str interpolation, bool antialias, SymInt[]? via, "
    "float[]? scale_factor, bool channels_last, str backend) -> Tensor",
    _gradient_requires,
    _gradient_empty,
    _gradient_launch,
    _gradient_backward,
    keeps=False,
    forward_mode=linear("resize_adjoint", 0),
)


def _out_requires(op, x, how, factors, out, backend) -> None:
    _requires(op, x, how._replace(size=tuple(out.shape[2:])), factors, False, backend)
    _contract.out(op, out, (*x.shape[:2], *out.shape[2:]), [x])


def _out_launch(x, how, factors, out, backend) -> None:
    _launch(x, how._replace(size=tuple(out.shape[2:])), factors, None, backend, out)


def _out_reference(x, how, factors, out, backend) -> None:
    written(out, reference.resize(x, *how._replace(size=tuple(out.shape[2:])), factors))


# Into a part of a larger buffer; for callers within the library, where no gradients are needed.
resize_out = register(
    "resize_out(Tensor x, str interpolation, bool antialias, SymInt[]? via, float[]? scale_factor, Tensor(a!) out, "
    "str backend) -> ()",
    _out_requires,
    None,
    _out_launch,
    reference=_out_reference,
)
