"""The guided filter, as a filter and as an upsampler."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast import _arguments
from murf_fast._layout import is_channels_last
from murf_fast.nn.guided.fixed_jbu import check_source_and_guidance, positive
from murf_fast.ops.resize import resize


class GuidedFilter(nn.Module):
    """In every window the source as a linear function of the guidance, averaged over the windows: the guided filter.

    ``out(p) = mean_{w around p} (a_w . I(p) + b_w)`` with ``a_w = (cov_w(I) + eps)^-1 cov_w(I, source)`` and
    ``b_w = mean_w(source) - a_w . mean_w(I)``, over windows of ``2 radius + 1`` pixels, cut at borders. A guidance of
    one channel is the gray, of three the colour guided filter. Where the guidance is larger than the source, windows,
    ``a`` and ``b`` are on the source's grid, of the guidance's means over its pixels, and ``a`` and ``b`` are
    upsampled bilinearly (the fast guided filter).

    Args:
        radius: Half the window's width, in pixels of the source.
        eps: Added to the guidance's variances, in its units squared.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Source: He et al., Guided Image Filtering, TPAMI 2013, eqs. 5-8 and 14-16; He and Sun, Fast Guided Filter, 2015.
    """

    def __init__(self, radius: int, eps: float) -> None:
        super().__init__()
        self.radius = _arguments.integer("GuidedFilter", "radius", radius, 1)
        self.eps = positive("GuidedFilter", "eps", eps)

    def forward(self, source: Tensor, guidance: Tensor) -> Tensor:
        """Filters ``source``, or upsamples it to the size of ``guidance``.

        Args:
            source: (B, C, h, w), floating point, any strides.
            guidance: (B, G, H, W), any G, in the dtype of the source or float32; no side is shorter than the source's.

        Returns:
            (B, C, H, W) in dtype and layout of the source; differentiable with respect to both.

        Raises:
            TypeError, ValueError: An argument is wrong; the message names it.

        Memory: the result three times (in float32 at least), and on the source's grid G (C + G) channels four times.
        """
        what = "GuidedFilter"
        check_source_and_guidance(what, source, guidance)
        size, grid = tuple(guidance.shape[2:]), tuple(source.shape[2:])
        if size[0] < grid[0] or size[1] < grid[1]:
            raise ValueError(f"murf_fast.{what}: `guidance` must be at least as large as `source`, {grid}, got {size}")
        dtype = torch.promote_types(source.dtype, torch.float32)
        with torch.autocast(source.device.type, enabled=False):
            # Around its mean the guidance's squares are smallest; variances are the same.
            p, fine = source.to(dtype), guidance.to(dtype)
            fine = fine - fine.mean((2, 3), keepdim=True)
            coarse = resize(fine, grid, mode="area")
            mean_i, mean_p = self._box(coarse), self._box(p)
            covariance = self._box(_products(coarse, p)) - _products(mean_i, mean_p)
            variance = self._box(_products(coarse, coarse)) - _products(mean_i, mean_i)
            guides = fine.shape[1]
            covariance, variance = (x.unflatten(1, (guides, -1)).permute(0, 3, 4, 1, 2) for x in (covariance, variance))
            variance = variance + self.eps * torch.eye(guides, dtype=dtype, device=p.device)
            # Positive definite, and not checked: that would wait for the device.
            slope = torch.linalg.solve_ex(variance, covariance)[0].permute(0, 3, 4, 1, 2)
            offset = mean_p - (slope * mean_i[:, :, None]).sum(1)
            layout = torch.channels_last if is_channels_last(source) else torch.contiguous_format
            result = resize(self._box(offset), size, memory_format=layout)
            for g in range(guides):
                upsampled = resize(self._box(slope[:, g]), size, memory_format=layout)
                result = torch.addcmul(result, upsampled, fine[:, g : g + 1])
        return result.to(source.dtype)

    if TYPE_CHECKING:
        __call__ = forward

    def _box(self, x: Tensor) -> Tensor:
        """Means over the window's pixels inside, rows and columns in turn."""
        n, r = 2 * self.radius + 1, self.radius
        x = F.avg_pool2d(x, (n, 1), 1, (r, 0), count_include_pad=False)
        return F.avg_pool2d(x, (1, n), 1, (0, r), count_include_pad=False)

    def extra_repr(self) -> str:
        return f"radius={self.radius}, eps={self.eps}"


def _products(a: Tensor, b: Tensor) -> Tensor:
    """(B, A * C, h, w) of every channel with every channel."""
    return (a[:, :, None] * b[:, None]).flatten(1, 2)
