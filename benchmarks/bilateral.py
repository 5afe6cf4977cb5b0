"""What the cases of joint bilateral upsampling share: parameters, and the ways people write it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from inputs import randn, up
from torch import Tensor

import murf_fast


def jbu_params(device, dtype, radius: int = 3) -> murf_fast.BilateralParams:
    """One level with weights of the size that trained ones have."""
    keys, taps = 32, (2 * radius + 1) ** 2
    shapes = [(keys, 3), (keys,), (keys, keys), (keys,), (taps, taps + 3), (taps,), (taps, taps), (taps,)]
    weights = [randn(device, dtype, *shape) / shape[-1] ** 0.5 for shape in shapes]
    return murf_fast.BilateralParams(*(torch.tensor(v, device=device, dtype=dtype) for v in (-0.5, 0.9)), *weights)


def shifted(source: Tensor, kernels: Tensor) -> Tensor:
    """An adaptive convolution as people write it where memory is short: one multiply-add per tap."""
    size, diameter = kernels.shape[2:], round(kernels.shape[1] ** 0.5)
    padded = F.pad(up(source, size, "bicubic"), [diameter // 2] * 4, mode="reflect")
    out = torch.zeros_like(padded[:, :, : size[0], : size[1]])
    for t in range(diameter**2):
        y, x = divmod(t, diameter)
        out.addcmul_(padded[:, :, y : y + size[0], x : x + size[1]], kernels[:, t : t + 1])
    return out


def channel_blocks(x: Tensor, size: int = 64) -> Iterator[tuple[tuple, Tensor]]:
    for begin in range(0, x.shape[1], size):
        where = (slice(None), slice(begin, min(begin + size, x.shape[1])))
        yield where, x[where].double()


def tiny_bilateral(device: str, function: Callable) -> None:
    """``function`` of a source, guidance and parameters of a few pixels and 3 x 3 taps, and all their gradients."""
    leaves = [torch.randn(1, 19, 3, 2, device=device), torch.randn(1, 3, 6, 5, device=device), *tiny_params(device)]
    leaves = [t.requires_grad_() for t in leaves]
    function(leaves[0], leaves[1], murf_fast.BilateralParams(*leaves[2:])).square().sum().backward()
    assert all(t.grad is None or t.grad.isfinite().all() for t in leaves)


def tiny_params(device: str) -> list[Tensor]:
    """Of three guides, eight keys and 3 x 3 taps."""
    shapes = [(), (), (8, 3), (8,), (8, 8), (8,), (9, 12), (9,), (9, 9), (9,)]
    return [torch.ones(shape, device=device) if not shape else torch.randn(shape, device=device) for shape in shapes]
