"""Resizes as float64 matrices, read off ``F.interpolate``."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEAREST = ("nearest", "nearest-exact")
ANTIALIASED = ("bilinear", "bicubic")
MODES = ("bilinear", "bicubic", "area", *NEAREST)


@functools.lru_cache(4096)
def matrix(n: int, m: int | None, mode: str, antialias: bool, factor: float | None) -> Tensor:
    """One axis of ``F.interpolate`` in float64, from n to m pixels or by a factor, in a mode other than nearest."""
    # Every unit vector of the axis. The other one is four pixels wide: torch's kernels for contiguous and channels_last
    # maps differ where the input or an antialiased result is one pixel wide. And it is resized where a factor is given,
    # as a map that keeps its size is copied, whatever the factor.
    units = torch.eye(n, dtype=torch.float64)[None, :, :, None].expand(-1, -1, -1, 4).contiguous()
    target = {"size": (m, 4)} if factor is None else {"scale_factor": (factor, 2.0)}
    if mode != "area":
        target["antialias"] = antialias
    table = F.interpolate(units, mode=mode, **target)[0, :, :, 0].T
    return table.contiguous() if n > 1 else torch.ones(table.shape, dtype=torch.float64)


@functools.lru_cache(4096)
def picks(
    grid: tuple[int, int],
    size: tuple[int, int] | None,
    mode: str,
    factors: tuple[float, float] | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Both axes of a nearest mode. Which pixel is read, torch's arithmetic for a contiguous map of ``dtype`` decides:
    in float32, or for float64 in float64; and which of its kernels it takes depends on both axes."""
    read = torch.float64 if dtype == torch.float64 else torch.float32
    rows, columns = (torch.arange(n, dtype=read) for n in grid)
    # Three channels, since one lies both ways in memory.
    numbers = torch.stack([rows[:, None].expand(grid), columns.expand(grid), torch.zeros(grid, dtype=read)])[None]
    result = F.interpolate(numbers, size=size, scale_factor=factors, mode=mode)[0].long()
    at = result[0, :, 0], result[1, 0]
    return tuple(F.one_hot(i, n).double() for i, n in zip(at, grid, strict=True))


def step(grid, size, mode: str, antialias: bool, factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows, columns) of one resize, by size or by factors."""
    if mode in NEAREST:
        return picks(tuple(grid), None if size is None else tuple(size), mode, factors, dtype)
    return tuple(
        matrix(n, None if size is None else size[i], mode, antialias, None if factors is None else factors[i])
        for i, n in enumerate(grid)
    )


def copies(grid: tuple[int, int], mode: str, antialias: bool, factors: tuple[float, float]) -> bool:
    """Whether torch copies a map whose size the factors keep, although their step is not one."""
    if any(int(n * f) != n for n, f in zip(grid, factors, strict=True)):
        return False
    probe = torch.linspace(-1, 1, 2 * grid[0] * grid[1]).square().view(1, 2, *grid)
    options = {} if mode == "area" else {"antialias": antialias}
    return torch.equal(F.interpolate(probe, scale_factor=factors, mode=mode, **options), probe)


@dataclass(frozen=True)
class Resize:
    """One or more resizes of a grid, one after the other: (rows, columns) of each."""

    steps: tuple[tuple[Tensor, Tensor], ...]

    @property
    def size(self) -> tuple[int, int]:
        rows, columns = self.steps[-1]
        return len(rows), len(columns)

    def _apply(self, x: Tensor, change) -> Tensor:
        for rows, columns in self.steps:
            rows, columns = change(rows).to(x.dtype), change(columns).to(x.dtype)
            x = torch.einsum("yi,bcij,xj->bcyx", rows, x, columns)
        return x

    def __call__(self, x: Tensor) -> Tensor:
        return self._apply(x, lambda m: m)

    def magnitude(self, x: Tensor) -> Tensor:
        """Of absolute values, with absolute weights: what roundings are relative to."""
        return self._apply(x.abs(), torch.abs)

    def transposed(self) -> Resize:
        return Resize(tuple((rows.T, columns.T) for rows, columns in reversed(self.steps)))

    @property
    def roundings(self) -> int:
        """How often a term is rounded on its way into a sum: weight and product per axis, then additions.

        A table that only picks pixels rounds nothing.
        """
        count = 0
        for matrix in (m for step in self.steps for m in step):
            picks = bool(((matrix == 0) | (matrix == 1)).all()) and int((matrix != 0).sum(1).max()) <= 1
            count += 0 if picks else 2 + int((matrix != 0).sum(1).max())
        return count


def resize_of(
    grid: tuple[int, int],
    size: tuple[int, int] | None,
    mode: str,
    antialias: bool = False,
    via: tuple[int, int] | None = None,
    factors: tuple[float, float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Resize:
    if factors is not None:
        if mode not in NEAREST and copies(grid, mode, antialias, factors):
            return resize_of(grid, grid, mode, antialias, dtype=dtype)
        return Resize((step(grid, None, mode, antialias, factors, dtype),))
    steps, between = [], grid
    for target in (size,) if via is None else (via, size):
        steps.append(step(between, target, mode, antialias, None, dtype))
        between = target
    return Resize(tuple(steps))
