"""What depth heads are trained by: the scale-invariant loss of log depth and that of its gradient.

Plain PyTorch keeps a dozen maps of the image's size for their backward. Here it is the depth, the target and the mask:
a logarithm is as fast to compute again as it is to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from murf_fast import reference
from murf_fast.ops import _checks
from murf_fast.ops._derivatives import differentiable_gradients, in_transform

EPS = 1e-3  # metres: as in DINOv2's code, so that no gradient explodes


def scale_invariant_log_loss(
    depth: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    max_depth: float | None = None,
    warm_up: bool = False,
    mean_weight: float = 0.15,
) -> Tensor:
    """SigLoss: the deviation of the log depth's error from a constant, and a little of that constant.

    ``sqrt(var g + mean_weight (mean g)^2)``, ``g = log(depth + 0.001) - log(target + 0.001)``, over the valid pixels of
    all images together: those with ``0 < target <= max_depth``, finite and not masked out. The variance is the unbiased
    one, and 0 of fewer than two pixels. Without a valid pixel, and where depth is right everywhere, the loss and its
    gradient are 0 (those of the original are NaN).

    Args:
        depth: (B, H, W), floating point and above -0.001.
        target: (B, H, W), in any floating dtype and in the unit of ``depth``; no gradients go to it.
        mask: (B, H, W), bool: False where a pixel does not count whatever its target; None counts all.
        max_depth: Largest target that counts; None: any finite one.
        warm_up: Without the variance, as the original trains its first 100 steps: pass ``step < 100``.
        mean_weight: Of the squared mean; 0 leaves out by what factor all depth is wrong.

    Returns:
        A scalar in float32 (float64 if ``depth`` is). Twice differentiable.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: two maps of the result's dtype and two of bools, one of which is kept for the backward beside depth and
    target; there the same, the gradient among them. Second derivatives, ``torch.func`` and ``torch.compile`` are given
    plain PyTorch.

    Source: AdaBins, equation 4 (without its factor 10), as DINOv2's ``SigLoss``.
    """
    op = "scale_invariant_log_loss"
    valid = _valid(op, depth, target, mask, max_depth)
    _checks.flag(op, "warm_up", warm_up)
    mean_weight = _checks.number(op, "mean_weight", mean_weight)
    if mean_weight < 0:
        raise ValueError(f"murf_fast.{op}: `mean_weight` must be at least 0, got {mean_weight}")
    arguments = target.detach(), valid, warm_up, mean_weight, EPS
    if _is_transformed():
        return reference.scale_invariant_log_loss(depth, *arguments)
    return _ScaleInvariant.apply(depth, *arguments)


def log_gradient_loss(
    depth: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    max_depth: float | None = None,
    strides: Sequence[int] = (1, 2, 4, 6),
) -> Tensor:
    """How far the slopes of log depth are from the target's, at several resolutions.

    ``sum_s (sum |g_(y+2) - g_y| + sum |g_(x+2) - g_x|) / N_s``, ``g`` as in :func:`scale_invariant_log_loss`, of every
    s-th row and column; over pairs of valid pixels, ``N_s`` being the number of valid pixels at that stride. A stride
    without one adds 0 (in the original NaN).

    Args:
        depth, target, mask, max_depth: As for :func:`scale_invariant_log_loss`.
        strides: Of the resolutions; (1, 2, 4, 8) are MegaDepth's.

    Returns:
        A scalar in float32 (float64 if ``depth`` is). Differentiable, with the gradient 0 where slopes are equal.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: as :func:`scale_invariant_log_loss`, and in the backward another map of both kinds.

    Source: MegaDepth, equation 6, as DINOv2's ``GradientLoss`` is for one image (H, W). In training that code is given
    (B, 1, H, W), whose first two axes, images and channels, it takes for rows and columns: it adds nothing for up to
    two images, and compares images with each other beyond. Here slopes are those of the image.
    """
    op = "log_gradient_loss"
    valid = _valid(op, depth, target, mask, max_depth)
    if not _checks.is_sequence(strides) or len(strides) == 0:
        raise TypeError(f"murf_fast.{op}: `strides` must be a non-empty list of integers, got {strides!r}")
    strides = tuple(_checks.integer(op, "strides", s, 1) for s in strides)
    if _is_transformed():
        return reference.log_gradient_loss(depth, target.detach(), valid, strides, EPS)
    return _Gradient.apply(depth, target.detach(), valid, strides, EPS)


def check_target(op: str, target: Any, mask: Any, max_depth: object) -> None:
    """What can be said of them before there is a depth."""
    _checks.tensor(op, "target", target)
    if target.ndim != 3 or min(target.shape[1:]) < 1:
        raise ValueError(
            f"murf_fast.{op}: `target` must be (B, H, W) with at least one pixel, got {tuple(target.shape)}"
        )
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"murf_fast.{op}: `mask` must be a tensor of bools, got {got}")
        if mask.shape != target.shape:
            raise ValueError(
                f"murf_fast.{op}: `mask` must have the shape of `target`, {tuple(target.shape)}, "
                f"got {tuple(mask.shape)}"
            )
        _checks.same_device(op, "mask", mask, "target", target)
    if max_depth is not None and _checks.number(op, "max_depth", max_depth) <= 0:
        raise ValueError(f"murf_fast.{op}: `max_depth` must be above 0, got {max_depth}")


def _valid(op: str, depth: Any, target: Any, mask: Tensor | None, max_depth: float | None) -> Tensor:
    """(B, H, W), bool: where both losses look."""
    _checks.tensor(op, "depth", depth)
    check_target(op, target, mask, max_depth)
    if depth.shape != target.shape:
        raise ValueError(
            f"murf_fast.{op}: `depth` must have the shape of `target`, {tuple(target.shape)}, got {tuple(depth.shape)}"
        )
    _checks.same_device(op, "target", target, "depth", depth)
    most = torch.finfo(target.dtype).max if max_depth is None else float(max_depth)
    valid = (target > 0).logical_and_(target <= most)
    return valid if mask is None else valid.logical_and_(mask)


def _is_transformed() -> bool:
    """Whether somebody makes a plan of the call who knows plain PyTorch only."""
    return torch.compiler.is_compiling() or in_transform() or forward_ad._current_level >= 0


class _ScaleInvariant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, depth: Tensor, target: Tensor, valid: Tensor, warm_up: bool, mean_weight: float, eps: float
    ) -> Tensor:
        ctx.save_for_backward(depth, target, valid)
        ctx.options = warm_up, mean_weight, eps
        return _deviation(depth, target, valid, *ctx.options)[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        depth, target, valid = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _of_plain(reference.scale_invariant_log_loss, ctx, grad)
        warm_up, mean_weight, eps = ctx.options
        (difference, mean, count), loss = _deviation(depth, target, valid, *ctx.options)
        per_loss = (grad / loss).where(loss != 0, 0)
        shift = mean_weight * mean * per_loss / count.clamp(min=1)
        if warm_up:
            of_log = difference.copy_(shift)
        else:
            slope = per_loss / (count - 1).clamp(min=1)
            of_log = difference.mul_(slope).add_(shift)  # the difference is one from the mean
        return _of_depth(of_log, depth, valid, eps), None, None, None, None, None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, depth: Tensor, target: Tensor, valid: Tensor, strides: Sequence[int], eps: float) -> Tensor:
        ctx.save_for_backward(depth, target, valid)
        ctx.options = strides, eps
        difference = _log_difference(depth, target, valid, eps)
        total = difference.new_zeros(())
        for s in strides:
            at = valid[:, ::s, ::s]
            for g, v in _both_ways(difference[:, ::s, ::s], at):
                total += _slopes(g, v).abs_().sum() / at.count_nonzero().clamp(min=1)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        depth, target, valid = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _of_plain(reference.log_gradient_loss, ctx, grad)
        strides, eps = ctx.options
        difference = _log_difference(depth, target, valid, eps)
        of_log = torch.zeros_like(difference)
        for s in strides:
            at = valid[:, ::s, ::s]
            share = grad / at.count_nonzero().clamp(min=1)
            ways = zip(_both_ways(difference[:, ::s, ::s], at), _both_ways(of_log[:, ::s, ::s], at), strict=True)
            for (g, v), (result, _) in ways:
                signs = _slopes(g, v).sign_().mul_(share)
                result[:, 2:].add_(signs)
                result[:, :-2].sub_(signs)
                del signs  # before the next ones are made
        return _of_depth(of_log, depth, valid, eps), None, None, None, None


def _deviation(
    depth: Tensor, target: Tensor, valid: Tensor, warm_up: bool, mean_weight: float, eps: float
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """``g`` less its mean (0 where not valid), the mean and the number of pixels; and the loss.

    The pixels are not counted by ``sum``, which on a CPU makes int64 of them first: two maps.
    """
    difference, count = _log_difference(depth, target, valid, eps), valid.count_nonzero()
    mean = difference.sum() / count.clamp(min=1)
    squared = mean_weight * mean.square()
    difference.sub_(mean).masked_fill_(~valid, 0)
    if not warm_up:
        norm = torch.linalg.vector_norm(difference)
        squared += norm.square() / (count - 1).clamp(min=1)
    return (difference, mean, count), squared.sqrt()


def _log_difference(depth: Tensor, target: Tensor, valid: Tensor, eps: float) -> Tensor:
    """A tensor of its own, 0 where not valid."""
    dtype = torch.promote_types(depth.dtype, torch.float32)
    result = depth.to(dtype).add(eps).log_()
    return result.sub_(target.to(dtype).add(eps).log_()).masked_fill_(~valid, 0)


def _of_depth(of_log: Tensor, depth: Tensor, valid: Tensor, eps: float) -> Tensor:
    """The gradient of depth, from that of its logarithm, in whose place it is made."""
    return of_log.div_(depth.to(of_log.dtype) + eps).masked_fill_(~valid, 0).to(depth.dtype)


def _slopes(g: Tensor, valid: Tensor) -> Tensor:
    """Differences of rows, 0 where one of the two is not valid; a tensor of its own."""
    return (g[:, 2:] - g[:, :-2]).masked_fill_(~(valid[:, 2:] & valid[:, :-2]), 0)


def _both_ways(x: Tensor, valid: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """Rows along the second axis, then columns along it."""
    return (x, valid), (x.mT, valid.mT)


def _of_plain(function: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient where its own gradient is wanted."""
    depth, target, valid = ctx.saved_tensors
    (of_depth,) = differentiable_gradients(lambda d: function(d, target, valid, *ctx.options), [depth], [True], grad)
    return of_depth, *[None] * (2 + len(ctx.options))
