"""Results against right values, element by element, and the roundings that a result may carry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def unit(dtype: torch.dtype) -> float:
    """Unit roundoff: half the distance of one to its successor."""
    return torch.finfo(dtype).eps / 2


def arithmetic(*dtypes: torch.dtype) -> torch.dtype:
    """What an operation on such tensors computes in: float64 where one is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


@dataclass(frozen=True)
class Comparison:
    """``|got - want| <= allowed`` and one rounding of ``want`` to the dtype of the result, for every element.

    ``want`` and ``allowed`` are float64. Where ``want`` is NaN or infinite, the result is the same; where it is within
    ``allowed`` of the end of the dtype's range, an infinity is right as well.
    """

    name: str
    got: Tensor
    want: Tensor
    allowed: Tensor
    dtype: torch.dtype

    def band(self) -> Tensor:
        """All that a result may differ by."""
        rounding = unit(self.dtype) * (self.want.abs() + self.allowed)
        return self.allowed + rounding + torch.finfo(self.dtype).smallest_normal * 2 * unit(self.dtype)

    def wrong(self) -> Tensor:
        """Which elements are outside their band."""
        got = self.got.detach().double()
        outside = ~((got - self.want).abs() <= self.band())
        same = (got == self.want) | (got.isnan() & self.want.isnan())
        overflow = got.isinf() & (self.want.abs() + self.band() >= torch.finfo(self.dtype).max)
        overflow = overflow & ((got > 0) == (self.want > 0))
        return outside & ~same & ~overflow

    def failure(self) -> str | None:
        """What is wrong, in one line; None if nothing is."""
        if tuple(self.got.shape) != tuple(self.want.shape):
            return f"{self.name}: shape {tuple(self.got.shape)}, right {tuple(self.want.shape)}"
        if self.got.dtype != self.dtype:
            return f"{self.name}: {self.got.dtype}, right {self.dtype}"
        wrong = self.wrong()
        if not bool(wrong.any()):
            return None
        error = (self.got.detach().double() - self.want).abs() / self.band()
        error = error.nan_to_num(torch.inf, torch.inf).where(wrong, 0.0)
        at = int(error.argmax())
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), self.want.shape))
        got, want, band = (float(x.detach().double().flatten()[at]) for x in (self.got, self.want, self.band()))
        return (
            f"{self.name}{list(where)} is {got:.9g}, right {want:.9g} +- {band:.2g} "
            f"({int(wrong.sum())} of {wrong.numel()} wrong)"
        )


def derived(name: str, got: Tensor, want: Tensor, allowed: Tensor | float, dtype: torch.dtype) -> Comparison:
    """A result with a bound that was derived element by element."""
    want = want.detach().double()
    return Comparison(name, got, want, torch.as_tensor(allowed, dtype=torch.float64).expand(want.shape), dtype)


def exact(name: str, got: Tensor, want: Tensor) -> Comparison:
    """A result that has nothing to round: labels, indices, copies."""
    want = want.detach().double()
    if not got.is_floating_point():
        got = got.double()
    return Comparison(name, got.double(), want, torch.full_like(want, -torch.finfo(torch.float64).tiny), torch.float64)
