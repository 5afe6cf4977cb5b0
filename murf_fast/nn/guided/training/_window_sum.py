"""Weighted sums of strided windows, without the windows in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from murf_fast.ops._derivatives import differentiable_gradients, in_transform


def window_sum(x: Tensor, weights: Tensor, stride: tuple[int, int]) -> Tensor:
    """``out[b, c, y, x] = sum_ij weights[b, i, j, y, x] in[b, c, y s_y + i, x s_x + j]``.

    Args:
        x: (B, C, H, W), with all windows inside.
        weights: (B, k_y, k_x, h, w) in the dtype of ``x``.
        stride: (s_y, s_x).

    Returns:
        (B, C, h, w) in the layout of ``x``, of which channels_last is the fast one. Twice differentiable.

    Memory: the result; in the backward the gradients and one map of the result's size. Autograd through slices would
    make a map of the size of ``x`` for every tap, ``unfold`` k_y k_x / (s_y s_x) of them at once.
    """
    if torch.compiler.is_compiling() or in_transform() or forward_ad._current_level >= 0:
        return _summed(x, weights, stride)
    return _WindowSum.apply(x, weights, stride)


class _WindowSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, stride: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.stride = stride
        return _summed(x, weights, stride)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weights), stride, needed = ctx.saved_tensors, ctx.stride, ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            return *differentiable_gradients(lambda x, w: _summed(x, w, stride), [x, weights], needed, grad), None
        of_x = torch.zeros_like(x) if needed[0] else None
        of_weights = torch.zeros_like(weights) if needed[1] else None
        for i, j in _taps(weights):
            if of_x is not None:
                _tap(of_x, i, j, weights, stride).addcmul_(grad, weights[:, i, j, None])
            if of_weights is not None:
                torch.sum(_tap(x, i, j, weights, stride) * grad, 1, out=of_weights[:, i, j])
        return of_x, of_weights, None


def _summed(x: Tensor, weights: Tensor, stride: tuple[int, int]) -> Tensor:
    result = torch.zeros_like(_tap(x, 0, 0, weights, stride))
    for i, j in _taps(weights):
        result = torch.addcmul(result, _tap(x, i, j, weights, stride), weights[:, i, j, None])
    return result


def _taps(weights: Tensor) -> list[tuple[int, int]]:
    return [(i, j) for i in range(weights.shape[1]) for j in range(weights.shape[2])]


def _tap(x: Tensor, i: int, j: int, weights: Tensor, stride: tuple[int, int]) -> Tensor:
    """(B, C, h, w), a view: what the tap sees in every window."""
    (height, width), (down, right) = weights.shape[3:], stride
    return x[:, :, i : i + down * (height - 1) + 1 : down, j : j + right * (width - 1) + 1 : right]
