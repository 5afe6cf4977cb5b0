"""k feature maps brought to one grid and concatenated."""

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
    empty_map,
    layout_of,
    register,
    wants_channels_last,
    written,
)
from murf_fast.ops.resize import resize_adjoint


def upsample_concat(
    features: Sequence[Tensor],
    size: Size,
    *,
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: Size | None = None,
    memory_format: torch.memory_format | None = None,
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Resize every map to one grid and concatenate them over channels, in one write of the result.

    ``out[:, c_s : c_s + C_s] = U_s F_s`` with ``U_s`` the resize of map ``s`` (``F.interpolate(align_corners=False)``).

    Args:
        features: Maps (B, C_s, h_s, w_s), floating point, one batch size, device and dtype. Any strides;
            channels_last is the fast path (tokens (B, N, C) viewed as maps are channels_last).
        size: (height, width) of the result in pixels; one integer means a square.
        mode: ``"bilinear"``, ``"bicubic"``, ``"area"``, ``"nearest"`` or ``"nearest-exact"``.
        antialias: Antialiased bilinear or bicubic, as in ``F.interpolate``.
        via: An intermediate grid. The maps are resized to it first and to ``size`` then, in one composed step; two
            chained resizes differ from a direct one.
        memory_format: Layout of the result: ``torch.channels_last``, ``torch.contiguous_format``, or None for the
            layout of ``features[0]``.
        out: A dense tensor to write into (contiguous or channels_last); refused while gradients are needed.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None chooses from the device.

    Returns:
        (B, sum C_s, height, width) in the dtype of the features. float32 arithmetic for half dtypes.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        BackendUnavailableError: ``backend`` cannot take this call.

    Memory: the result, and a few low-resolution rows per thread.

    Source: MuRF, equation 2; the concatenation of scaling_on_scales and of mmsegmentation's ``resize_concat``.
    """
    op = "upsample_concat"
    features = _checks.maps(op, features, same_channels=False)
    how = _checks.resize(op, size, mode, antialias, via)
    channels_last = wants_channels_last(op, memory_format, features[0])
    backend = _checks.backend(backend, features[0])
    if out is not None:
        _checks.out(op, out, _shape(features, how), features, memory_format)
    if backend == "reference":
        result = _reference(features, how, channels_last, backend)
        return result if out is None else out.copy_(result)
    if out is not None:
        _upsample_concat_out(features, how, out, backend)
        return out
    return _upsample_concat(features, how, channels_last, backend)


def _shape(features, how) -> tuple[int, ...]:
    return features[0].shape[0], sum(f.shape[1] for f in features), *how.size


def _requires(op, features, how, channels_last, backend) -> None:
    _contract.maps(op, features, same_channels=False)
    _contract.backend(op, backend, features[0])
    _contract.resize(op, how)


def _empty(features, how, channels_last, backend) -> Tensor:
    return empty_map(features[0], _shape(features, how), channels_last)


def _launch(features, how, channels_last, backend, out) -> None:
    backends.launcher(backend).upsample_concat(features, axes_of_maps(features, *how), out)


def _reference(features, how, channels_last, backend) -> Tensor:
    return reference.upsample_concat(features, **how._asdict()).contiguous(memory_format=layout_of(channels_last))


def _backward(wanted, arguments, grad):
    features, how, _, backend = arguments
    parts = grad.split([f.shape[1] for f in features], 1)
    gradients = [
        resize_adjoint(part, f.shape[2:], how, None, f.channels_last, backend) if needed else None
        for part, needed, f in zip(parts, wanted[0], features, strict=True)
    ]
    return (gradients,)


def _out_requires(op, features, how, out, backend) -> None:
    _requires(op, features, how, None, backend)
    _contract.out(op, out, _shape(features, how), features)


_upsample_concat = register(
    "upsample_concat(Tensor[] features, SymInt[] size, str interpolation, bool antialias, SymInt[]? via, "
    "bool channels_last, str backend) -> Tensor",
    _requires,
    _empty,
    _launch,
    _backward,
    keeps=False,
    forward_mode=linear("upsample_concat", 0),
    reference=_reference,
    onnx=True,
    checked=True,
)
_upsample_concat_out = register(
    "upsample_concat_out(Tensor[] features, SymInt[] size, str interpolation, bool antialias, SymInt[]? via, "
    "Tensor(a!) out, str backend) -> ()",
    _out_requires,
    None,
    lambda features, how, out, backend: _launch(features, how, None, backend, out),
    reference=lambda features, how, out, _: written(out, reference.upsample_concat(features, **how._asdict())),
    checked=True,
)
