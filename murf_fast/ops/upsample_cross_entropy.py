"""Cross-entropy of low-resolution logits against full-resolution labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast.ops import _checks
from murf_fast.ops._derivatives import reference_second_derivative
from murf_fast.ops._library import axes_of_maps, empty_map, float32_rows, register
from murf_fast.ops.upsample_expectation import bias_gradient

REDUCTIONS = ("mean", "sum", "none")
LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def upsample_cross_entropy(
    features: Sequence[Tensor],
    target: Tensor,
    *,
    bias: Tensor | None = None,
    mode: str = "bilinear",
    antialias: bool = False,
    via: int | tuple[int, int] | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
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
    maps. Second derivatives run through the reference, which makes full-resolution logits.

    Source: ``F.cross_entropy(F.interpolate(logits, size), target)``, the training loss of every segmentation head.
    """
    op = "upsample_cross_entropy"
    features = _checks.maps(op, features, same_channels=True)
    first = features[0]
    via = _checks.optional_grid(op, "via", via)
    _checks.mode(op, mode, antialias)
    _checks.bias(op, bias, features)
    _check_target(op, target, first)
    if weight is not None:
        _checks.vector(op, "weight", weight, first.shape[1], first, what="one entry per class")
        _checks.no_gradients(op, "`weight`", [weight])
    ignore_index = _checks.integer(op, "ignore_index", ignore_index)
    label_smoothing = _checks.number(op, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"murf_fast.{op}: `label_smoothing` must be in [0, 1], got {label_smoothing!r}")
    _checks.choice(op, "reduction", reduction, REDUCTIONS)
    backend = backends.resolve(backend, first.device.type, first.dtype)
    # Small label types hold neither every class nor every ignore_index.
    target = target.long()
    if backend == "reference":
        _check_labels(target, first.shape[1], ignore_index)
        wide = [f.to(torch.promote_types(f.dtype, torch.float32)) for f in features]
        return reference.upsample_cross_entropy(
            wide, target, bias, mode, antialias, via, ignore_index, weight, label_smoothing, reduction
        )
    loss, _ = torch.ops.murf_fast.upsample_cross_entropy(
        features, bias, target, weight, mode, antialias, via, ignore_index, label_smoothing, backend
    )
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / _denominator(target, weight, ignore_index)


def _check_target(op: str, target: object, first: Tensor) -> None:
    if not isinstance(target, Tensor) or target.dtype not in LABELS:
        got = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"murf_fast.{op}: `target` must be an integer tensor of labels (B, H, W), got {got}")
    _checks.dense(op, "target", target)
    if target.ndim != 3 or target.shape[0] != first.shape[0] or target.shape[1] < 1 or target.shape[2] < 1:
        raise ValueError(
            f"murf_fast.{op}: `target` must be (B, H, W) with the batch size of `features`, {first.shape[0]}, and at "
            f"least one pixel, got {tuple(target.shape)}"
        )
    if target.device != first.device:
        raise ValueError(f"murf_fast.{op}: `target` must be on {first.device}, got {target.device}")


def _check_labels(target: Tensor, classes: int, ignore_index: int) -> None:
    if target.device.type != "cpu":
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(wrong.any()):
        raise ValueError(
            f"murf_fast.upsample_cross_entropy: `target` must hold labels in [0, {classes}) or ignore_index "
            f"{ignore_index}, got {int(target[wrong][0])}"
        )


def _denominator(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    counts = target != ignore_index
    if weight is None:
        return counts.sum()
    return (weight.float()[target.where(counts, 0)] * counts).sum()


def _forward(
    features, bias, target, weight, mode, antialias, via, ignore_index, label_smoothing, backend
) -> tuple[Tensor, Tensor]:
    _check_labels(target, features[0].shape[1], ignore_index)
    loss = features[0].new_empty(target.shape, dtype=torch.float32)
    lse = features[0].new_empty((2, *target.shape), dtype=torch.float32)
    if loss.numel():
        axes = axes_of_maps(features, target.shape[1:], mode, antialias, via)
        backends.launcher(backend).upsample_cross_entropy(
            features,
            axes,
            float32_rows(bias),
            target.contiguous(),
            None if weight is None else weight.to(torch.float32).contiguous(),
            ignore_index,
            label_smoothing,
            loss,
            lse,
        )
    return loss, lse


def _fake(
    features, bias, target, weight, mode, antialias, via, ignore_index, label_smoothing, backend
) -> tuple[Tensor, Tensor]:
    """``lse`` in two parts, which the backward needs apart: the largest logit, and the logarithm of the sum."""
    empty = features[0].new_empty(target.shape, dtype=torch.float32)
    return empty, empty.new_empty((2, *target.shape))


def _setup_context(ctx, inputs, output) -> None:
    features, bias, target, weight, *ctx.rest = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(bias, target, weight, lse, *features)


def _backward(ctx, grad, _grad_lse):
    bias, target, weight, lse, *features = ctx.saved_tensors
    gradients = torch.ops.murf_fast.upsample_cross_entropy_backward(
        grad, features, bias, target, weight, lse, *ctx.rest
    )
    grad_features = [
        g.to(f.dtype) if needed else None
        for g, f, needed in zip(gradients, features, ctx.needs_input_grad[0], strict=True)
    ]
    grad_bias = bias_gradient(gradients[0], bias) if ctx.needs_input_grad[1] else None
    return grad_features, grad_bias, *(8 * [None])


def _gradients(
    grad, features, bias, target, weight, lse, mode, antialias, via, ignore_index, label_smoothing, backend
) -> list[Tensor]:
    gradients = [empty_map(f, f.shape, True, torch.float32) for f in features]
    if grad.numel():
        axes = axes_of_maps(features, target.shape[1:], mode, antialias, via)
        backends.launcher(backend).upsample_cross_entropy_backward(
            features,
            axes,
            float32_rows(bias),
            target.contiguous(),
            None if weight is None else weight.to(torch.float32).contiguous(),
            ignore_index,
            label_smoothing,
            lse.contiguous(),
            grad.to(torch.float32).contiguous(),
            gradients,
        )
    return gradients


def _gradients_fake(
    grad, features, bias, target, weight, lse, mode, antialias, via, ignore_index, label_smoothing, backend
) -> list[Tensor]:
    return [empty_map(f, f.shape, True, torch.float32) for f in features]


def _gradients_setup_context(ctx, inputs, output) -> None:
    grad, features, bias, target, weight, _, *ctx.rest = inputs
    ctx.save_for_backward(grad, bias, target, weight, *features)


def _gradients_backward(ctx, directions):
    grad, bias, target, weight, *features = ctx.saved_tensors
    mode, antialias, via, ignore_index, label_smoothing, _ = ctx.rest

    def losses(*tensors: Tensor) -> Tensor:
        maps, offset = tensors[: len(features)], None if bias is None else tensors[-1]
        return reference.upsample_cross_entropy(
            maps, target, offset, mode, antialias, via, ignore_index, weight, label_smoothing, "none"
        )

    wanted = [True] * len(features) + [False]
    (of_grad,), (*of_features, of_bias) = reference_second_derivative(
        losses, [*features, bias], [grad], [*directions, None], wanted
    )
    return of_grad, of_features, of_bias, *[None] * 9


register(
    "upsample_cross_entropy(Tensor[] features, Tensor? bias, Tensor target, Tensor? weight, str interpolation, "
    "bool antialias, SymInt[]? via, int ignore_index, float label_smoothing, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _backward,
    _setup_context,
)
register(
    "upsample_cross_entropy_backward(Tensor grad, Tensor[] features, Tensor? bias, Tensor target, Tensor? weight, "
    "Tensor lse, str interpolation, bool antialias, SymInt[]? via, int ignore_index, float label_smoothing, "
    "str backend) -> Tensor[]",
    _gradients,
    _gradients_fake,
    _gradients_backward,
    _gradients_setup_context,
)
