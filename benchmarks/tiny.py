"""Inputs of a few pixels: for the smallest calls of the kernels, and with many channels for their configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from inputs import CL
from torch import Tensor

PLANAR = torch.contiguous_format
SIZE = (23, 300)  # more pixels than a tile has


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


def wide_maps(device: str, dtype: torch.dtype, memory_format: torch.memory_format) -> list[Tensor]:
    """Two maps of 768 channels, which want a gradient."""
    maps = [torch.zeros(1, 768, n, n, device=device, dtype=dtype) for n in (5, 9)]
    return [m.contiguous(memory_format=memory_format).requires_grad_() for m in maps]


def class_maps(device: str, dtype: torch.dtype) -> Iterator[tuple[list[Tensor], dict]]:
    """Maps of classes, and how to resize them: what changes the kernels that reduce the channels of a pixel. What they
    do with a layout does not depend on the dtype, and what they do with many classes not on the layout.
    """
    wide = wide_maps(device, dtype, CL)
    few, bias = [m[:, :19] for m in wide], torch.zeros(768, device=device)
    yield few, {"size": SIZE}
    # Pixels that begin on no vector of 16 elements, in maps too large for a copy and in small ones.
    yield (
        [torch.zeros(1, 150, n, 2 * n, device=device, dtype=dtype, requires_grad=True) for n in (3, 4, 40)],
        {"size": SIZE},
    )
    yield [torch.zeros(1, 150, n, n, device=device, dtype=dtype, requires_grad=True) for n in (3, 4, 5)], {"size": SIZE}
    if dtype == torch.float32:
        yield [m[:, :19] for m in wide_maps(device, dtype, PLANAR)], {"size": SIZE}
    else:
        yield wide, {"size": SIZE, "mode": "bicubic", "bias": bias}
        yield few, {"size": (3, 3), "mode": "area", "bias": bias[:19]}


def backward(*results: Tensor) -> None:
    """Gradients of all that the results were made of; theirs are dense, as a network's are."""
    torch.autograd.backward(results, [torch.ones_like(x) for x in results])
