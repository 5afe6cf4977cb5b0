"""Attention as colors: every feature has one, and a pixel is the mean of those that it attends to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LIGHTNESS, CHROMA = 0.7, 0.35
# Oklab (Ottosson, 2020): from lightness and two chromas to roots of cone responses, and from these to linear sRGB.
_TO_CONES = (
    (1.0, 0.3963377774, 0.2158037573),
    (1.0, -0.1055613458, -0.0638541728),
    (1.0, -0.0894841775, -1.2914855480),
)
_TO_RGB = (
    (4.0767416621, -3.3077115913, 0.2309699292),
    (-1.2684380046, 2.6097574011, -0.3413193965),
    (-0.0041960863, -0.7034186147, 1.7076147010),
)


def oklab_plane(grid: Sequence[int]) -> Tensor:
    """(3, h, w) linear sRGB of one lightness, whose two chromas run from -0.35 with the row and the column."""
    rows, columns = ((2 * torch.arange(n, dtype=torch.float32, device="cpu") / n - 1) * CHROMA for n in grid)
    first, second = torch.meshgrid(rows, columns, indexing="ij")
    lab = torch.stack([torch.full_like(first, LIGHTNESS), first, second])
    cones = torch.einsum("ij,jyx->iyx", torch.tensor(_TO_CONES, dtype=torch.float32, device="cpu"), lab)
    return torch.einsum("ij,jyx->iyx", torch.tensor(_TO_RGB, dtype=torch.float32, device="cpu"), cones**3)


def encoded(linear: Tensor) -> Tensor:
    """sRGB values of linear ones."""
    x = linear.clamp(0, 1)
    return torch.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


def show(colors: Tensor, attended: Tensor) -> None:
    """Both side by side, by matplotlib: (3, h, w) and (3, H, W), linear."""
    from matplotlib import pyplot

    _, axes = pyplot.subplots(1, 2, figsize=(10, 5))
    for axis, name, picture in zip(axes, ("Reference (Values)", "Attention Output"), (colors, attended), strict=True):
        axis.imshow(encoded(picture.detach().float().cpu()).permute(1, 2, 0).numpy())
        axis.set_title(name)
    pyplot.show()
