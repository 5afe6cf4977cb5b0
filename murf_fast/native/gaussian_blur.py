"""Gaussian smoothing as a sum over the two banded tables of one map, rows kept in the caches."""

from __future__ import annotations

from torch import Tensor

from murf_fast.native.upsample_sum import upsample_sum
from murf_fast.tables.gaussian import gaussian_axis

__all__ = ["gaussian_blur"]


def gaussian_blur(x: Tensor, sigma: float, border: str, out: Tensor) -> None:
    """``out`` (B, C, H, W) of the map ``x``, both axes in one pass."""
    axes = gaussian_axis(x.shape[2], sigma, border), gaussian_axis(x.shape[3], sigma, border)
    upsample_sum([x], [axes], None, out)
