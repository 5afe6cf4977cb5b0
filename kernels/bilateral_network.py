"""The parameters of `bilateral_kernels` and its 1x1 convolutions, which are products of dense matrices and belong to
torch. They run band by band, on the pixels of a band as the rows of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast.kernels import folded

# First parameter of each layer: weight, and bias behind it.
RANGE0, RANGE1, FIXUP0, FIXUP1 = 2, 4, 6, 8


class Network:
    """The parameters in float32, in the shapes that the products take."""

    def __init__(
        self,
        guidance: Tensor,
        params: list[Tensor],
        range_mask: Tensor | None,
        fixup_mask: Tensor | None,
        radius: int,
    ):
        self.guidance, self.radius, self.diameter = guidance, radius, 2 * radius + 1
        self.taps, self.keys = self.diameter**2, params[3].numel()
        self.params = [p.detach().float().contiguous() for p in params]
        self.params[2::2] = [weight.flatten(1) for weight in self.params[2::2]]
        self.range_mask, self.fixup_mask = range_mask, fixup_mask
        # Rounded once: every pixel has the same error in them, which the gradients of parameters add up.
        temperature, sigma = self.params[0].double(), self.params[1].double()
        offset = torch.linspace(-1, 1, self.diameter, dtype=torch.float64, device=guidance.device).square()
        distance = offset[:, None] + offset
        self.temperature, self.distance = temperature.exp().clamp(1e-4, 1e4).float(), distance.float()
        self.spatial = torch.exp(-distance / (2 * sigma.square())).float()

    @property
    def has_fixup(self) -> bool:
        return len(self.params) > FIXUP0

    def bands(self, step: int = 1, row_bytes: int = 0) -> Iterator[folded.Band]:
        """Bands for rows of kernels and projections, and of ``row_bytes`` that somebody else needs."""
        batch, _, height, width = self.guidance.shape
        return folded.bands(batch, height, max(width * max(self.taps, self.keys) * 4, row_bytes), step)

    def guides(self, band: folded.Band) -> Tensor:
        """(pixels, G) float32"""
        return pixels(self.guidance, band).float()

    def layer(self, first: int, inputs: Tensor) -> Tensor:
        return torch.addmm(self.params[first + 1], inputs, self.params[first].t())

    def activated(self, before: Tensor, mask: Tensor | None, band: folded.Band) -> Tensor:
        return masked(F.gelu(before), mask, band)

    def project(self, band: folded.Band) -> Tensor:
        """(images, rows, width, K)"""
        hidden = self.activated(self.layer(RANGE0, self.guides(band)), self.range_mask, band)
        return self.layer(RANGE1, hidden).view(band.images, band.rows, -1, self.keys)


def pixels(x: Tensor, band: folded.Band) -> Tensor:
    """The band of a map (B, C, H, W) as (pixels, C)."""
    return folded.rows_of(x, band).permute(0, 2, 3, 1).flatten(0, 2)


def masked(x: Tensor, mask: Tensor | None, band: folded.Band) -> Tensor:
    """``x`` (pixels, channels) times the factors of its images, in place."""
    if mask is None:
        return x
    factors = mask[band.image : band.image + band.images].float()
    return x.view(band.images, -1, x.shape[1]).mul_(factors[:, None]).view(x.shape)


def without_autocast(x: Tensor) -> torch.autocast:
    """The products stay float32 whatever the caller's autocast says."""
    return torch.autocast(x.device.type, enabled=False)
