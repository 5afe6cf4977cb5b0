"""Multi-view consistency: what features upsampled once should look like in every other view of the image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from murf_fast.annotations import Size
from murf_fast.nn.guided.training.views import Views
from murf_fast.ops import _checks

Downsampler = Callable[[Tensor, tuple[int, int]], Tensor]


def downsampled_views(
    upsampled: Tensor, views: Views, downsampler: Downsampler, size: Size, *, recompute: bool = False
) -> Tensor:
    """``down(t(F))`` for every view t: what a backbone should make of the views, by the upsampled features.

    Args:
        upsampled: (B, C, H, W), an upsampler's result.
        views: Of the images, ``views(images)`` being what the backbone sees.
        downsampler: Called with features (B, C, H, W) and ``size``; a :class:`SimpleDownsampler` or
            :class:`AttentionDownsampler`.
        size: (height, width) of the backbone's maps, one integer for a square.
        recompute: Make a view once more in the backward instead of keeping it.

    Returns:
        ``(B count, C, *size)``, image by image. Differentiable.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it. And what the downsampler raises.

    Memory: the result, and what one view takes: one map of the size of ``upsampled`` beside the downsampler's. Where
    gradients are needed that of all views, or with ``recompute`` of one.
    """
    op = "downsampled_views"
    _checks.map_(op, "upsampled", upsampled)
    _views(op, views)
    if not callable(downsampler):
        raise TypeError(f"murf_fast.{op}: `downsampler` must be callable, got {type(downsampler).__name__}")
    size = _checks.grid(op, "size", size)
    _checks.flag(op, "recompute", recompute)

    def seen(features: Tensor, view: Views) -> Tensor:
        return downsampler(view(features), size)

    if recompute and torch.is_grad_enabled():
        results = [checkpoint(seen, upsampled, view, use_reentrant=False) for view in views.split()]
    else:
        results = [seen(upsampled, view) for view in views.split()]
    return torch.stack(results, 1).flatten(0, 1)


def consistency_loss(
    upsampled: Tensor,
    targets: Tensor,
    views: Views,
    downsampler: Downsampler,
    *,
    log_scale: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """How far upsampled features, seen in other views and downsampled, are from the backbone's own of these views.

    ``mean (down(t(F)) - f(t(x)))^2`` over all views t, places and channels; with a scale s for every place
    ``mean (.)^2 / (2 s^2) + log s``, a likelihood that forgives features which cannot be predicted.

    Args:
        upsampled: (B, C, H, W), an upsampler's result.
        targets: (B count, C, h, w), the backbone's maps of ``views(images)``, in any floating dtype; no gradients go to
            them.
        views: The views.
        downsampler, recompute: As for :func:`downsampled_views`.
        log_scale: (B count, 1, h, w) or (B count, C, h, w), ``log s``; FeatUp makes it of the targets by a linear
            layer.

    Returns:
        A scalar, in float32 (float64 if ``upsampled`` is). Differentiable.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: that of :func:`downsampled_views`, and two maps of the targets' size.

    Source: FeatUp, equation 1 with its adaptive uncertainty, and FeatSharp, section 3.3, which keeps the squared error.
    """
    op = "consistency_loss"
    _checks.map_(op, "upsampled", upsampled)
    _checks.map_(op, "targets", targets)
    batch, count = _views(op, views).matrices.shape[:2]
    if len(upsampled) != batch:
        raise ValueError(
            f"murf_fast.{op}: `upsampled` must be of the {batch} images of the views, got {len(upsampled)}"
        )
    expected = (batch * count, upsampled.shape[1])
    if tuple(targets.shape[:2]) != expected:
        raise ValueError(
            f"murf_fast.{op}: `targets` must have a map of every view and the channels of `upsampled`, {expected}, got "
            f"{tuple(targets.shape[:2])}"
        )
    _checks.same_device(op, "targets", targets, "upsampled", upsampled)
    if log_scale is not None:
        _checks.map_(op, "log_scale", log_scale)
        one_for_all = (len(targets), 1, *targets.shape[2:])
        if tuple(log_scale.shape) not in (one_for_all, tuple(targets.shape)):
            raise ValueError(
                f"murf_fast.{op}: `log_scale` must have shape {one_for_all} or that of `targets`, got "
                f"{tuple(log_scale.shape)}"
            )
        _checks.same_device(op, "log_scale", log_scale, "targets", targets)
    size = tuple(targets.shape[2:])
    predictions = downsampled_views(upsampled, views, downsampler, size, recompute=recompute)
    dtype = torch.promote_types(upsampled.dtype, torch.float32)
    squared = (predictions.to(dtype) - targets.detach().to(dtype)).square()
    if log_scale is None:
        return squared.mean()
    log_scale = log_scale.to(dtype)
    return (squared / 2 * (-2 * log_scale).exp() + log_scale).mean()


def _views(op: str, views: object) -> Views:
    if not isinstance(views, Views):
        raise TypeError(f"murf_fast.{op}: `views` must be Views, got {type(views).__name__}")
    return views
