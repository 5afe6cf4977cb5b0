"""Inputs of a few pixels, for the smallest calls of the kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def maps(device: str, gradient: bool = False) -> list[Tensor]:
    """Two maps of 19 channels."""
    return [torch.randn(1, 19, h, w, device=device, requires_grad=gradient) for h, w in ((3, 2), (2, 5))]


def differentiated(device: str, function: Callable[[list[Tensor]], Tensor]) -> None:
    """``function`` of the maps, and their gradients."""
    leaves = maps(device, gradient=True)
    function(leaves).sum().backward()
    assert all(m.grad.isfinite().all() for m in leaves if m.grad is not None)


def attention(device: str, function: Callable, size: tuple[int, int]) -> None:
    """``function`` of queries of ``size`` and keys and values on a grid of 3 x 4, and all their gradients."""
    q, k, v = (torch.randn(1, 20, *grid, device=device, requires_grad=True) for grid in (size, (3, 4), (3, 4)))
    function(q, k, v).square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))
