"""k feature maps brought to one grid and concatenated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast.ops import _checks
from murf_fast.ops._derivatives import linear
from murf_fast.ops._library import axes_of_maps, empty_map, is_channels_last, register, wants_channels_last


def upsample_concat(
    features: Sequence[Tensor],
    size: int | tuple[int, int],
    *,
    mode: str = "bilinear",
    antialias: bool = False,
    via: int | tuple[int, int] | None = None,
    memory_format: torch.memory_format | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
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
    size, via = _checks.grid(op, "size", size), _checks.optional_grid(op, "via", via)
    _checks.mode(op, mode, antialias)
    channels_last = wants_channels_last(op, memory_format, features[0])
    backend = backends.resolve(backend, features[0].device.type, features[0].dtype)
    if out is not None:
        shape = (features[0].shape[0], sum(f.shape[1] for f in features), *size)
        _checks.out(op, out, shape, features)
        if memory_format is not None and not out.is_contiguous(memory_format=memory_format):
            raise ValueError(f"murf_fast.{op}: `out` has strides {tuple(out.stride())}, which is not {memory_format}")
    if backend == "reference":
        result = reference.upsample_concat(features, size, mode, antialias, via)
        if out is not None:
            return out.copy_(result)
        return result.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if out is not None:
        torch.ops.murf_fast.upsample_concat_out(features, size, mode, antialias, via, out, backend)
        return out
    return torch.ops.murf_fast.upsample_concat(features, size, mode, antialias, via, channels_last, backend)


def _launch(features, size, mode, antialias, via, out, backend) -> None:
    if out.numel():
        backends.launcher(backend).upsample_concat(features, axes_of_maps(features, size, mode, antialias, via), out)


def _empty(features, size, channels_last) -> Tensor:
    shape = (features[0].shape[0], sum(f.shape[1] for f in features), *size)
    return empty_map(features[0], shape, channels_last)


def _forward(features, size, mode, antialias, via, channels_last, backend) -> Tensor:
    out = _empty(features, size, channels_last)
    _launch(features, size, mode, antialias, via, out, backend)
    return out


def _fake(features, size, mode, antialias, via, channels_last, backend) -> Tensor:
    return _empty(features, size, channels_last)


def _setup_context(ctx, inputs, output) -> None:
    features, ctx.size, ctx.mode, ctx.antialias, ctx.via, _, ctx.backend = inputs
    ctx.maps = [(f.shape[1], f.shape[2:], is_channels_last(f)) for f in features]


def _backward(ctx, grad):
    gradients, begin = [], 0
    for needed, (channels, in_size, channels_last) in zip(ctx.needs_input_grad[0], ctx.maps, strict=True):
        part = grad[:, begin : begin + channels]
        begin += channels
        gradients.append(
            torch.ops.murf_fast.resize_adjoint(
                part, in_size, ctx.mode, ctx.antialias, ctx.via, None, channels_last, ctx.backend
            )
            if needed
            else None
        )
    return gradients, None, None, None, None, None, None


register(
    "upsample_concat(Tensor[] features, SymInt[] size, str interpolation, bool antialias, SymInt[]? via, "
    "bool channels_last, str backend) -> Tensor",
    _forward,
    _fake,
    _backward,
    _setup_context,
    linear("upsample_concat", 0),
)
register(
    "upsample_concat_out(Tensor[] features, SymInt[] size, str interpolation, bool antialias, SymInt[]? via, "
    "Tensor(a!) out, str backend) -> ()",
    _launch,
    lambda features, size, mode, antialias, via, out, backend: None,
)
