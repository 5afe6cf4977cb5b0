"""Maximum mean discrepancy of feature maps of different sizes, without matrices of pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from murf_fast import reference
from murf_fast.nn.guided.training import _pairs
from murf_fast.ops import _checks
from murf_fast.ops._derivatives import differentiable_gradients, in_transform


def mmd_loss(features: Tensor, upsampled: Tensor, *, gamma: float | None = None) -> Tensor:
    """How unlike the distribution of upsampled features is that of the features: the squared MMD.

    ``mean_(i != j) k(x_i, x_j) + mean_(i != j) k(y_i, y_j) - 2 mean_ij k(x_i, y_j)`` with
    ``k(a, b) = exp(-gamma |a - b|^2)``, of the places x of ``features`` and y of ``upsampled``, for every image, then
    the mean of images. It is an unbiased estimate, so it may be below 0.

    Args:
        features: (B, C, h, w), floating point; two places at least.
        upsampled: (B, C, H, W), floating point; two places at least.
        gamma: Of the kernel; None: for every image one by the median of ``|x_i - x_j|^2``, i != j, of its
            ``features``, through which no gradient goes; 0 where that median is 0. (The paper has the median itself;
            with that, features of hundreds of channels would all be infinitely far apart, and the loss 0.)

    Returns:
        A scalar in float32 (float64 if an argument is). Twice differentiable with respect to both maps.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: blocks of 1024 x 1024 pairs and a copy of one image's features; where gradients are needed these, made with
    the result and kept for the backward: no pair is visited twice. Second derivatives, ``torch.func`` and
    ``torch.compile`` are given plain PyTorch, with the matrices.

    Source: Gretton et al. 2012, equation 3, as FeatSharp, appendix B.2, equation 10 and Table 9.
    """
    op = "mmd_loss"
    for name, x in (("features", features), ("upsampled", upsampled)):
        _checks.map_(op, name, x)
        if x.shape[2] * x.shape[3] < 2:
            raise ValueError(f"murf_fast.{op}: `{name}` must have two places at least, got {tuple(x.shape[2:])}")
    if features.shape[:2] != upsampled.shape[:2]:
        raise ValueError(
            f"murf_fast.{op}: `upsampled` must have batch and channels of `features`, {tuple(features.shape[:2])}, got "
            f"{tuple(upsampled.shape[:2])}"
        )
    if len(features) == 0:
        raise ValueError(f"murf_fast.{op}: `features` must be of one image at least, got {tuple(features.shape)}")
    _checks.same_device(op, "upsampled", upsampled, "features", features)
    if gamma is not None:
        gamma = _checks.number(op, "gamma", gamma)
        if gamma <= 0:
            raise ValueError(f"murf_fast.{op}: `gamma` must be above 0 or None, got {gamma}")
    with torch.autocast(features.device.type, enabled=False):
        if torch.compiler.is_compiling() or in_transform() or forward_ad._current_level >= 0:
            return reference.mmd_loss(features, upsampled, gamma)
        return _MMD.apply(features, upsampled, gamma)


class _MMD(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, upsampled: Tensor, gamma: float | None) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(features.dtype, upsampled.dtype), torch.float32)
        needed = ctx.needs_input_grad[:2]
        gradients = [
            x.new_zeros((len(x), x.shape[2] * x.shape[3], x.shape[1]), dtype=dtype) if n else None
            for x, n in zip((features, upsampled), needed, strict=True)
        ]
        total = features.new_zeros((), dtype=torch.float64)
        for i in range(len(features)):
            x, y = (t[i].to(dtype).flatten(1).mT for t in (features, upsampled))
            middle = x.mean(0)
            # Far from 0 distances would cancel: each map about its own mean, and both about one.
            x, y, own = x - middle, y - middle, y - y.mean(0)
            of_x, of_y = (None if g is None else g[i] for g in gradients)
            g = _gamma(x) if gamma is None else x.new_full((), gamma)
            for a, b, of_a, of_b, share in (
                (x, x, of_x, of_x, 1 / (len(x) * (len(x) - 1))),
                (own, own, of_y, of_y, 1 / (len(y) * (len(y) - 1))),
                (x, y, of_x, of_y, -2 / (len(x) * len(y))),
            ):
                total += _kernel_sum(a, b, g, share / len(features), of_a, of_b)
        ctx.save_for_backward(features, upsampled, *gradients)
        ctx.gamma = gamma
        return total.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, upsampled, *gradients = ctx.saved_tensors
        inputs, needed = (features, upsampled), ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            found = differentiable_gradients(lambda x, y: reference.mmd_loss(x, y, ctx.gamma), inputs, needed, grad)
            return *found, None
        found = (
            None if g is None else (g * grad).mT.unflatten(2, x.shape[2:]).to(x.dtype)
            for x, g in zip(inputs, gradients, strict=True)
        )
        return *found, None


def _gamma(x: Tensor) -> Tensor:
    median = _pairs.median_squared_distance(x)
    return torch.where(median > 0, 1 / median, 0)


def _kernel_sum(a: Tensor, b: Tensor, gamma: Tensor, share: float, of_a: Tensor | None, of_b: Tensor | None) -> Tensor:
    """``share sum_ij k(a_i, b_j)``, without i = j if the points are the same ones; adds its gradients to theirs."""
    total = a.new_zeros((), dtype=torch.float64)
    for rows in _pairs.blocks(len(a)):
        for columns in _pairs.blocks(len(b)):
            if a is b and columns.start < rows.start:
                continue  # the block on the other side of the diagonal counts twice
            twice = 2 if a is b and columns.start > rows.start else 1
            kernel = _pairs.squared_distances(a[rows], b[columns]).mul_(-gamma).exp_()
            if a is b and columns.start == rows.start:
                kernel.fill_diagonal_(0)
            total += kernel.sum(1).sum(dtype=torch.float64).mul_(twice * share)
            strength = -2 * twice * share * gamma
            if of_a is not None:
                of_a[rows] += _pull(kernel, a[rows], b[columns]).mul_(strength)
            if of_b is not None:
                of_b[columns] += _pull(kernel.mT, b[columns], a[rows]).mul_(strength)
    return total


def _pull(kernel: Tensor, of: Tensor, others: Tensor) -> Tensor:
    """``sum_j k_ij (a_i - b_j)``."""
    return torch.addmm(kernel.sum(1, keepdim=True) * of, kernel, others, alpha=-1)
