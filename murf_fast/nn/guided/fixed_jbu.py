"""Joint bilateral upsampling without anything learned."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from murf_fast import _arguments, windows
from murf_fast._constant import constant_while_compiling
from murf_fast._layout import is_channels_last
from murf_fast.ops import _checks
from murf_fast.ops.resize import resize
from murf_fast.ops.window_attention import window_attention


class FixedJBU(nn.Module):
    """Upsamples a map to the size of a guidance with two Gaussians of given widths: joint bilateral upsampling.

    ``out(p) = sum_q w(p, q) source(q) / sum_q w(p, q)``,
    ``w(p, q) = exp(-|p - q|^2 / (2 sigma_spatial^2)) exp(-|I(p) - I(q)|^2 / (2 sigma_range^2))``, over the source's
    pixels q within ``radius`` rows and columns of p; distances are in its pixels, and I(q) is the guidance's mean over
    its pixel. That is attention whose scores are products of the guidance with itself, and runs as such. It is the
    baseline of the papers; the learned ones are :class:`JBULevel` and :class:`JBUStack`.

    Args:
        sigma_spatial: Width of the spatial Gaussian, in pixels of the source.
        sigma_range: That of the range Gaussian, in units of the guidance.
        radius: Half the window's width, in pixels of the source, at least 1.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Source: Kopf et al., Joint Bilateral Upsampling, SIGGRAPH 2007, section 3; they read I(q) at one pixel.
    """

    def __init__(self, sigma_spatial: float, sigma_range: float, radius: int = 2) -> None:
        super().__init__()
        self.sigma_spatial, self.sigma_range = (
            positive("FixedJBU", name, value)
            for name, value in (("sigma_spatial", sigma_spatial), ("sigma_range", sigma_range))
        )
        if self.sigma_range < torch.finfo(torch.float32).max ** -0.5:
            raise ValueError(
                f"murf_fast.FixedJBU: `sigma_range` must be one whose inverse square is finite in float32, got "
                f"{self.sigma_range}"
            )
        self.radius = _arguments.integer("FixedJBU", "radius", radius, 1)

    def forward(self, source: Tensor, guidance: Tensor) -> Tensor:
        """Upsamples ``source`` to the size of ``guidance``.

        Args:
            source: (B, C, h, w), floating point, any strides.
            guidance: (B, G, H, W), any G, in the dtype of the source or float32.

        Returns:
            (B, C, H, W) in dtype and layout of the source; differentiable with respect to both.

        Raises:
            TypeError, ValueError: An argument is wrong; the message names it.

        Memory: the result (of half types another one in float32), and two maps of G + 1 channels at its size. Scores
        grow with ``|I|^2 / sigma_range^2``, and so do the roundings of their float32.
        """
        what = "FixedJBU"
        check_source_and_guidance(what, source, guidance)
        size, grid = tuple(guidance.shape[2:]), tuple(source.shape[2:])
        dtype = torch.promote_types(source.dtype, torch.float32)
        layout = torch.channels_last if is_channels_last(source) else torch.contiguous_format
        with torch.autocast(source.device.type, enabled=False):
            # Around its mean the guidance's products are smallest; differences are the same.
            centred = guidance.to(dtype)
            centred = centred - centred.mean((2, 3), keepdim=True)
            small = resize(centred, grid, mode="area")
            # Of the square of the difference, the term of the query alone cancels.
            q = torch.cat([centred * self.sigma_range**-2, torch.ones_like(centred[:, :1])], 1)
            k = torch.cat([small, small.square().sum(1, keepdim=True) * (-0.5 * self.sigma_range**-2)], 1)
            of_rows, of_columns = (
                (-0.5 * (_away(n, m, q) / self.sigma_spatial) ** 2)[None] for n, m in zip(size, grid, strict=True)
            )
            rule = _windows(size, grid, self.radius)
            q, v = q.contiguous(memory_format=layout), source.to(dtype)
            return window_attention(q, k, v, windows=rule, num_heads=1, scale=1.0, bias=(of_rows, of_columns)).to(
                source.dtype
            )

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"sigma_spatial={self.sigma_spatial}, sigma_range={self.sigma_range}, radius={self.radius}"


def positive(what: str, name: str, value: object) -> float:
    value = _arguments.number(what, name, value)
    if value <= 0:
        raise ValueError(f"murf_fast.{what}: `{name}` must be positive, got {value}")
    return value


def check_source_and_guidance(what: str, source: Tensor, guidance: Tensor) -> None:
    _checks.map_(what, "source", source)
    _checks.map_(what, "guidance", guidance)
    _checks.companion(what, "guidance", guidance, "source", source)


def _away(out: int, size: int, like: Tensor) -> Tensor:
    """(out, size): from every output, in pixels of the source, to every one of them."""
    at = (torch.arange(out, dtype=like.dtype, device=like.device) + 0.5) * size / out - 0.5
    return at[:, None] - torch.arange(size, dtype=like.dtype, device=like.device)


@constant_while_compiling
def _windows(size: tuple[int, ...], grid: tuple[int, ...], radius: int) -> windows.Windows:
    """Source pixels within the radius, which are fewer at borders."""
    return _made(size, grid, radius)


@lru_cache(maxsize=64)
def _made(size: tuple[int, ...], grid: tuple[int, ...], radius: int) -> windows.Windows:
    """In whole numbers, as rounding must not decide."""
    axes = []
    for out, n in zip(size, grid, strict=True):
        twice = (2 * torch.arange(out) + 1) * n - out  # the position times 2 out
        start = -((2 * out * radius - twice).div(2 * out, rounding_mode="floor"))
        end = (twice + 2 * out * radius).div(2 * out, rounding_mode="floor") + 1
        axes.append((start.clamp(min=0).int(), end.clamp(max=n).int()))
    return windows.ranges(axes[0], axes[1], grid)
