"""Labels at full resolution from logits at low resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast.annotations import Backend, Mode, Size
from murf_fast.ops import _checks, _contract
from murf_fast.ops._library import axes_of_maps, float32_rows, register


@overload
def upsample_argmax(
    features: Sequence[Tensor],
    size: Size,
    *,
    bias: Tensor | None = None,
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: Size | None = None,
    return_values: Literal[False] = False,
    backend: Backend | None = None,
) -> Tensor: ...
@overload
def upsample_argmax(
    features: Sequence[Tensor],
    size: Size,
    *,
    bias: Tensor | None = None,
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: Size | None = None,
    return_values: Literal[True],
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def upsample_argmax(
    features: Sequence[Tensor],
    size: Size,
    *,
    bias: Tensor | None = None,
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: Size | None = None,
    return_values: bool,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def upsample_argmax(
    features: Sequence[Tensor],
    size: Size,
    *,
    bias: Tensor | None = None,
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: Size | None = None,
    return_values: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The class of the largest summed, resized logit of every pixel; full-resolution logits never exist.

    ``labels = argmax_k (sum_s U_s F_s + bias)_k``. Of equal logits the lowest class wins and a NaN beats everything, as
    in ``torch.argmax`` and ``torch.max``.

    Args:
        features: Maps of logits (B, K, h_s, w_s), floating point, one batch size, class count, device and dtype.
        size: (height, width) of the labels in pixels; one integer means a square.
        bias: (K,), or (B, K) for a bias per image.
        mode, antialias, via, backend: As for :func:`upsample_concat`.
        return_values: Also return the largest logit of every pixel (without gradients).

    Returns:
        Labels (B, height, width): uint8 up to 256 classes, int16 up to 32768, int32 above. With ``return_values`` also
        the logits (B, height, width) in the dtype of the features.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        BackendUnavailableError: ``backend`` cannot take this call.

    Memory: the result, and a few low-resolution rows per thread. On a GPU also copies of maps whose channels are no
    multiple of 16 or not side by side, where the result is four times as large.

    Source: ``F.interpolate(logits, size).argmax(1)``, the evaluation of every segmentation head.
    """
    op = "upsample_argmax"
    features = _checks.maps(op, features, same_channels=True)
    how = _checks.resize(op, size, mode, antialias, via)
    _checks.bias(op, bias, features)
    _checks.flag(op, "return_values", return_values)
    if return_values:
        _checks.no_gradients(op, "`return_values=True`", [*features, bias])
    backend = _checks.backend(backend, features[0])
    if backend == "reference":
        labels, values = _reference(features, bias, how, True, backend)
    else:
        # Labels have no gradient, and an op without an autograd formula must not see inputs that want one.
        features, bias = [f.detach() for f in features], None if bias is None else bias.detach()
        labels, values = _upsample_argmax(features, bias, how, return_values, backend)
    return (labels, values) if return_values else labels


def label_dtype(classes: int) -> torch.dtype:
    """The smallest integer type that holds every class."""
    return torch.uint8 if classes <= 256 else torch.int16 if classes <= 32768 else torch.int32


def _requires(op, features, bias, how, return_values, backend) -> None:
    _contract.sum_of_maps(op, features, bias, how, backend)


def _empty(features, bias, how, return_values, backend) -> tuple[Tensor, Tensor]:
    first, shape = features[0], (features[0].shape[0], *how.size)
    return first.new_empty(shape, dtype=label_dtype(first.shape[1])), first.new_empty(shape if return_values else (0,))


def _launch(features, bias, how, return_values, backend, results) -> None:
    labels, values = results
    backends.launcher(backend).upsample_argmax(
        features, axes_of_maps(features, *how), float32_rows(bias), labels, values if return_values else None
    )


def _reference(features, bias, how, return_values, backend) -> tuple[Tensor, Tensor]:
    labels, values = reference.upsample_argmax(features, how.size, bias, **how.options)
    return labels.to(label_dtype(features[0].shape[1])), values if return_values else values.new_empty((0,))


_upsample_argmax = register(
    "upsample_argmax(Tensor[] features, Tensor? bias, SymInt[] size, str interpolation, bool antialias, SymInt[]? via, "
    "bool return_values, str backend) -> (Tensor, Tensor)",
    _requires,
    _empty,
    _launch,
    reference=_reference,
    onnx=True,
    checked=True,
)
