"""Wrong results on purpose: how it is shown that the comparisons see them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fuzz.compare import Comparison


def beyond(check: Comparison, seed: int) -> Comparison | None:
    """The comparison with one element moved out of its band by a thousandth of it; None if no element can be."""
    want, band = check.want.flatten(), check.band().flatten()
    finite = want.isfinite() & band.isfinite() & (want.abs() + 4 * band < torch.finfo(check.dtype).max)
    if not bool(finite.any()):
        return None
    at = finite.nonzero().flatten()
    at = int(at[seed % len(at)])
    got = check.got.detach().double().flatten().clone()
    edge = want[at] + 1.001 * band[at] + torch.finfo(torch.float64).eps * want[at].abs()
    got[at] = torch.nextafter(edge, torch.full_like(edge, torch.inf))
    # In float64, so that what is held against the band is what was meant; the dtype is not in question here.
    return dataclasses.replace(check, got=_As(got.view(check.want.shape), check.dtype))


class _As:
    """float64 values that say they are of another dtype."""

    def __init__(self, values: Tensor, dtype: torch.dtype) -> None:
        self._values, self.dtype, self.shape = values, dtype, values.shape

    def detach(self) -> Tensor:
        return self._values


class _Backward(torch.autograd.Function):
    """The identity, whose gradient has one wrong element."""

    @staticmethod
    def forward(ctx, x, alter):
        ctx.alter = alter
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.alter(grad), None


class Alter:
    """Moves the largest element of every tensor by ``share`` of itself, or 8 roundings; an index, to the one before."""

    def __init__(self, share: float) -> None:
        self.share, self.altered = share, False

    def __call__(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or not x.numel():
            return x
        sizes = x.detach().double().abs()
        sizes = sizes.where(sizes.isfinite(), 0.0)
        if float(sizes.max()) == 0:
            return x
        self.altered = True
        step = torch.zeros_like(x)
        at = torch.unravel_index(sizes.argmax(), x.shape)
        step[at] = float(sizes.max()) * max(self.share, 8 * torch.finfo(x.dtype).eps) if x.is_floating_point() else 1
        return x - step


class AlterGradient(Alter):
    """The same for what is sent back."""

    def __call__(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or not x.requires_grad:
            return x
        return _Backward.apply(x, super().__call__)


def alterations() -> tuple[Alter, Alter]:
    """Of results, and of what is sent back through them."""
    return Alter(1e-4), AlterGradient(1e-2)
