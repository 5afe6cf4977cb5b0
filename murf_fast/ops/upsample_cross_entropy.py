"""Cross-entropy of low-resolution logits against full-resolution labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast.annotations import Backend, Mode, Size
from murf_fast.ops import _checks, _contract
from murf_fast.ops._derivatives import reference_second_derivative
from murf_fast.ops._labels import check_labels, check_target
from murf_fast.ops._library import as_float32, axes_of_maps, bias_gradient, empty_map, float32_rows, register

REDUCTIONS = ("mean", "sum", "none")


def upsample_cross_entropy(
    features: Sequence[Tensor],
    target: Tensor,
    *,
    bias: Tensor | None = None,
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: Size | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: Backend | None = None,
) -> Tensor:
    """``F.cross_entropy(sum_s U_s F_s + bias, target)`` without full-resolution logits, forward and backward.

    With ``z`` the summed, resized logits of a pixel, ``t`` its label, class weights ``w`` and smoothing ``e`` over K
    classes, ``loss = (1 - e) w_t (lse(z) - z_t) + e / K sum_k w_k (lse(z) - z_k)``. ``"mean"`` divides the sum by that
    of ``w_t`` over the pixels that count.

    Args:
        features: Maps of logits (B, K, h_s, w_s), floating point, one batch size, class count, device and dtype.
        target: Labels (B, H, W), any integer dtype; their grid is the output grid.
        bias: (K,), or (B, K) for a bias per image.
        mode, antialias, via, backend: As for :func:`upsample_concat`.
        ignore_index: Label of pixels that do not count.
        weight: (K,), class weights, floating point.
        label_smoothing: In [0, 1].
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or (B, H, W) with ``reduction="none"``; float32 (float64 for float64 features). Differentiable with
        respect to features and bias.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it. Labels out of range raise on CPU; on CUDA,
            where looking at them would stall the stream, they make the loss NaN.
        BackendUnavailableError: ``backend`` cannot take this call.

    Memory: three float32 maps (B, H, W), two of them kept for backward, and float32 gradients of the low-resolution
    maps. On a GPU also copies of maps whose channels are no multiple of 16 or not side by side, where the result is
    four times as large. Second derivatives run through the reference, which makes full-resolution logits.

    Source: ``F.cross_entropy(F.interpolate(logits, size), target)``, the training loss of every segmentation head.
    """
    op = "upsample_cross_entropy"
    features = _checks.maps(op, features, same_channels=True)
    first = features[0]
    check_target(op, target, first)
    how = _checks.resize(op, tuple(target.shape[1:]), mode, antialias, via, name="target")
    _checks.bias(op, bias, features)
    if weight is not None:
        _checks.vector(op, "weight", weight, first.shape[1], first, what="one entry per class")
        _checks.no_gradients(op, "`weight`", [weight])
    ignore_index = _checks.integer(op, "ignore_index", ignore_index)
    label_smoothing = _checks.number(op, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"murf_fast.{op}: `label_smoothing` must be in [0, 1], got {label_smoothing!r}")
    _checks.choice(op, "reduction", reduction, REDUCTIONS)
    backend = _checks.backend(backend, first)
    # Small label types hold neither every class nor every ignore_index.
    target = target.long()
    if backend == "reference":
        check_labels(op, target, first.shape[1], ignore_index)
        wide = [f.to(torch.promote_types(f.dtype, torch.float32)) for f in features]
        return reference.upsample_cross_entropy(
            wide,
            target,
            bias,
            **how.options,
            ignore_index=ignore_index,
            weight=weight,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
    loss, _ = _upsample_cross_entropy(features, bias, target, weight, how, ignore_index, label_smoothing, backend)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / _denominator(target, weight, ignore_index)


def _denominator(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    counts = target != ignore_index
    if weight is None:
        return counts.sum()
    return (weight.float()[target.where(counts, 0)] * counts).sum()


def _requires(op, features, bias, target, weight, how, ignore_index, label_smoothing, backend) -> None:
    _contract.sum_of_maps(op, features, bias, how, backend)
    first = features[0]
    _contract.tensor(op, "target", target, first, (first.shape[0], None, None), (torch.int64,))
    _contract.grid(op, "target's size", target.shape[1:])
    if weight is not None:
        _contract.tensor(op, "weight", weight, first, (first.shape[1],), _checks.DTYPES)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"murf_fast.{op}: `label_smoothing` must be in [0, 1], got {label_smoothing!r}")


def _empty(features, bias, target, weight, how, ignore_index, label_smoothing, backend) -> tuple[Tensor, Tensor]:
    """``lse`` in two parts, which the backward needs apart: the largest logit, and the logarithm of the sum."""
    shape = target.shape
    return tuple(features[0].new_empty(s, dtype=torch.float32) for s in (shape, (2, *shape)))


def _launch(features, bias, target, weight, how, ignore_index, label_smoothing, backend, results) -> None:
    check_labels("upsample_cross_entropy", target, features[0].shape[1], ignore_index)
    arguments = _of_kernels(features, bias, target, weight, how, ignore_index, label_smoothing)
    backends.launcher(backend).upsample_cross_entropy(*arguments, *results)


def _of_kernels(features, bias, target, weight, how, ignore_index, label_smoothing) -> tuple[Any, ...]:
    """What the kernels of loss and gradient both take."""
    axes = axes_of_maps(features, *how._replace(size=tuple(target.shape[1:])))
    target, weight = target.contiguous(), as_float32(weight)
    return features, axes, float32_rows(bias), target, weight, ignore_index, label_smoothing


def _backward(wanted, arguments, grad, _):
    features, bias, target, weight, *options, lse = arguments
    gradients = _gradient(grad, features, bias, target, weight, lse, *options)
    return (
        [g.to(f.dtype) if needed else None for g, f, needed in zip(gradients, features, wanted[0], strict=True)],
        # The rows of a resize sum to one, so the gradient of any one map has the same sum.
        bias_gradient(gradients[0], bias) if wanted[1] else None,
    )


def _gradient_requires(
    op, grad, features, bias, target, weight, lse, how, ignore_index, label_smoothing, backend
) -> None:
    _requires(op, features, bias, target, weight, how, ignore_index, label_smoothing, backend)
    _contract.tensor(op, "grad", grad, target, target.shape, _checks.DTYPES)
    _contract.tensor(op, "lse", lse, target, (2, *target.shape), (torch.float32,))


def _gradient_empty(grad, features, *_) -> list[Tensor]:
    return [empty_map(f, f.shape, True, torch.float32) for f in features]


def _gradient_launch(
    grad, features, bias, target, weight, lse, how, ignore_index, label_smoothing, backend, gradients
) -> None:
    arguments = _of_kernels(features, bias, target, weight, how, ignore_index, label_smoothing)
    backends.launcher(backend).upsample_cross_entropy_backward(
        *arguments, lse.contiguous(), as_float32(grad), gradients
    )


def _gradient_backward(_, arguments, directions):
    grad, features, bias, target, weight, _, how, ignore_index, label_smoothing, _ = arguments

    def losses(*tensors: Tensor) -> Tensor:
        return reference.upsample_cross_entropy(
            tensors[: len(features)],
            target,
            None if bias is None else tensors[-1],
            **how.options,
            ignore_index=ignore_index,
            weight=weight,
            label_smoothing=label_smoothing,
            reduction="none",
        )

    wanted = [True] * len(features) + [False]
    (of_grad,), (*of_features, of_bias) = reference_second_derivative(
        losses, [*features, bias], [grad], [*directions, None], wanted
    )
    return of_grad, of_features, of_bias


def _reference(features, bias, target, weight, how, ignore_index, label_smoothing, backend) -> tuple[Tensor, Tensor]:
    check_labels("upsample_cross_entropy", target, features[0].shape[1], ignore_index)
    features, size = [f.float() for f in features], tuple(target.shape[1:])
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "none"}
    loss = reference.upsample_cross_entropy(features, target, bias, **how.options, weight=weight, **options)
    logits = reference.upsample_sum(features, size, bias, **how.options).detach()
    largest = logits.amax(1)
    return loss, torch.stack([largest, (logits - largest[:, None]).exp().sum(1).log()])


_upsample_cross_entropy = register(
    "upsample_cross_entropy(Tensor[] features, Tensor? bias, Tensor target, Tensor? weight, str interpolation, "
    "bool antialias, SymInt[]? via, int ignore_index, float label_smoothing, str backend) -> (Tensor, Tensor)",
    _requires,
    _empty,
    _launch,
    _backward,
    keeps_result=1,
    reference=_reference,
    checked=True,
)
_gradient = register(
    "upsample_cross_entropy_backward(Tensor grad, Tensor[] features, Tensor? bias, Tensor target, Tensor? weight, "
    "Tensor lse, str interpolation, bool antialias, SymInt[]? via, int ignore_index, float label_smoothing, "
    "str backend) -> Tensor[]",
    _gradient_requires,
    _gradient_empty,
    _gradient_launch,
    _gradient_backward,
)
