"""The sum of k maps brought to one grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast.annotations import Backend, Mode, Size
from murf_fast.ops import _checks, _contract
from murf_fast.ops._derivatives import linear
from murf_fast.ops._library import (
    axes_of_maps,
    bias_gradient,
    empty_map,
    float32_rows,
    layout_of,
    register,
    wants_channels_last,
    written,
)
from murf_fast.ops.resize import resize_adjoint


def upsample_sum(
    features: Sequence[Tensor],
    size: Size,
    *,
    bias: Tensor | None = None,
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: Size | None = None,
    memory_format: torch.memory_format | None = None,
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Resize every map to one grid and add them up, in one write of the result.

    ``out = sum_s U_s F_s + bias``. A 1x1 convolution over concatenated, resized maps is this sum over maps that went
    through their share of the convolution at low resolution.

    Args:
        features: Maps (B, C, h_s, w_s), floating point, one batch size, channel count, device and dtype. Any strides.
        size: (height, width) of the result in pixels; one integer means a square.
        bias: (C,), or (B, C) for a bias per image; any floating dtype, used in float32.
        mode, antialias, via, memory_format, out, backend: As for :func:`upsample_concat`.

    Returns:
        (B, C, height, width) in the dtype of the features.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        BackendUnavailableError: ``backend`` cannot take this call.

    Memory: the result, and a few low-resolution rows per thread. On a GPU also copies of maps whose channels are no
    multiple of 16 or not side by side, where the result is four times as large.

    Source: MuRF's head, at low resolution; ``logits = F.interpolate(...)`` of every linear segmentation head.
    """
    op = "upsample_sum"
    features = _checks.maps(op, features, same_channels=True)
    how = _checks.resize(op, size, mode, antialias, via)
    _checks.bias(op, bias, features)
    channels_last = wants_channels_last(op, memory_format, features[0])
    backend = _checks.backend(backend, features[0])
    if out is not None:
        _checks.out(op, out, (*features[0].shape[:2], *how.size), [*features, bias], memory_format)
    if backend == "reference":
        result = _reference(features, bias, how, channels_last, backend)
        return result if out is None else out.copy_(result)
    if out is not None:
        _upsample_sum_out(features, bias, how, out, backend)
        return out
    return _upsample_sum(features, bias, how, channels_last, backend)


def _requires(op, features, bias, how, channels_last, backend) -> None:
    _contract.sum_of_maps(op, features, bias, how, backend)


def _empty(features, bias, how, channels_last, backend) -> Tensor:
    return empty_map(features[0], (*features[0].shape[:2], *how.size), channels_last)


def _launch(features, bias, how, channels_last, backend, out) -> None:
    backends.launcher(backend).upsample_sum(features, axes_of_maps(features, *how), float32_rows(bias), out)


def _reference(features, bias, how, channels_last, backend) -> Tensor:
    result = reference.upsample_sum(features, how.size, bias, **how.options)
    return result.contiguous(memory_format=layout_of(channels_last))


def _backward(wanted, arguments, grad):
    features, bias, how, _, backend = arguments
    gradients = [
        resize_adjoint(grad, f.shape[2:], how, None, f.channels_last, backend) if needed else None
        for needed, f in zip(wanted[0], features, strict=True)
    ]
    return gradients, bias_gradient(grad, bias) if wanted[1] else None


def _out_requires(op, features, bias, how, out, backend) -> None:
    _contract.sum_of_maps(op, features, bias, how, backend)
    _contract.out(op, out, (*features[0].shape[:2], *how.size), [*features, bias])


_upsample_sum = register(
    "upsample_sum(Tensor[] features, Tensor? bias, SymInt[] size, str interpolation, bool antialias, SymInt[]? via, "
    "bool channels_last, str backend) -> Tensor",
    _requires,
    _empty,
    _launch,
    _backward,
    keeps=False,
    forward_mode=linear("upsample_sum", 0, 1),
    reference=_reference,
    onnx=True,
    checked=True,
)
_upsample_sum_out = register(
    "upsample_sum_out(Tensor[] features, Tensor? bias, SymInt[] size, str interpolation, bool antialias, "
    "SymInt[]? via, Tensor(a!) out, str backend) -> ()",
    _out_requires,
    None,
    lambda features, bias, how, out, backend: _launch(features, bias, how, None, backend, out),
    reference=lambda features, bias, how, out, _: written(
        out, reference.upsample_sum(features, how.size, bias, **how.options)
    ),
    checked=True,
)
