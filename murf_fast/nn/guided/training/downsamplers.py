"""Learned downsamplers: what a backbone makes of features finer than its grid, during training."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast.annotations import Size
from murf_fast.nn.guided.training._window_sum import window_sum
from murf_fast.ops import _checks

_BLUR = 2  # taps to each side


class SimpleDownsampler(nn.Module):
    """One learned blur kernel, ``|k| / sum |k|``, the same for all channels and places.

    Windows lie about the middle of the cells of the coarse grid, mirrored at the borders. FeatUp's lie inside the map,
    which is the same where the kernel is as large as a cell, and moves away from the cells where it is larger.

    Args:
        kernel_size: (rows, columns) or one integer, in pixels of the fine map; best of the parity of a cell's size,
            otherwise a window's middle is half a pixel before its cell's.

    Raises:
        TypeError, ValueError: ``kernel_size`` is no size.

    Source: FeatUp, section 3.1, its simple downsampler.
    """

    def __init__(self, kernel_size: Size) -> None:
        super().__init__()
        self.kernel_size = _checks.grid("SimpleDownsampler", "kernel_size", kernel_size)
        self.kernel = nn.Parameter(torch.ones(self.kernel_size))

    def forward(self, features: Tensor, size: Size) -> Tensor:
        """Features on a coarser grid.

        Args:
            features: (B, C, H, W), floating point.
            size: (height, width) of the result, one integer for a square; divides that of the features.

        Returns:
            ``(B, C, *size)`` in the dtype of the features; computed in float32 at least. Differentiable.

        Raises:
            TypeError, ValueError: An argument is wrong, or a window is larger than the mirrored map; the message names
                it.

        Memory: the result; where windows overlap a padded copy of the features, of half features one in float32.
        """
        x, stride = _checked("SimpleDownsampler", features, size, self.kernel_size)
        x = _padded(x, stride, self.kernel_size)
        kernel = self.kernel.to(x.dtype).abs()
        kernel = kernel / kernel.sum()
        with torch.autocast(x.device.type, enabled=False):
            result = F.conv2d(x.flatten(0, 1)[:, None], kernel[None, None], stride=stride)
        return result[:, 0].unflatten(0, x.shape[:2]).to(features.dtype)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"


class AttentionDownsampler(nn.Module):
    """A kernel for every coarse cell, from the saliency of the fine features in its window.

    ``out = sum_t softmax_t(w_t a_t + b_t) g_t`` over the window's pixels t, of the blurred features ``g = G f`` and
    their saliency ``a = v . g + c``. Windows are those of :class:`SimpleDownsampler`. In training a fifth of the
    features that make the saliency and of the window's saliencies are zeroed, as in the original, which does the former
    after the blur.

    Args:
        channels: Of the features.
        kernel_size: (rows, columns) or one integer, in pixels of the fine map; 7 in FeatSharp, a cell in FeatUp.
        dropout: Share that is zeroed in training.
        sigma: Of the blur of 5 x 5 pixels; None: no blur.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Source: FeatUp, section 3.1, its attention downsampler, which FeatSharp takes over.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: Size = 7,
        *,
        dropout: float = 0.2,
        sigma: float | None = 1.0,
    ) -> None:
        super().__init__()
        what = "AttentionDownsampler"
        self.channels = _checks.integer(what, "channels", channels, 1)
        self.kernel_size = _checks.grid(what, "kernel_size", kernel_size)
        self.dropout = _checks.number(what, "dropout", dropout)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"murf_fast.{what}: `dropout` must be at least 0 and below 1, got {dropout}")
        self.sigma = None if sigma is None else _checks.number(what, "sigma", sigma)
        if self.sigma is not None and self.sigma <= 0:
            raise ValueError(f"murf_fast.{what}: `sigma` must be above 0 or None, got {sigma}")
        self.saliency = nn.Conv2d(self.channels, 1, 1)
        self.weight = nn.Parameter(torch.ones(self.kernel_size))
        self.bias = nn.Parameter(torch.zeros(self.kernel_size))

    def forward(self, features: Tensor, size: Size) -> Tensor:
        """Features on a coarser grid; arguments, result and errors as of :meth:`SimpleDownsampler.forward`.

        The result is channels_last by strides.

        Memory: as there, and maps of one channel; the features once more if their channels are not last, and in
        training, zeroed in part. No map is blurred: the saliency is, which is linear in the features, and the kernels
        are, which then are 4 pixels larger.
        """
        what, margin = "AttentionDownsampler", 0 if self.sigma is None else _BLUR
        window = self.kernel_size[0] + 2 * margin, self.kernel_size[1] + 2 * margin
        x, stride = _checked(what, features, size, window)
        if x.shape[1] != self.channels:
            raise ValueError(f"murf_fast.{what}: `features` must have {self.channels} channels, got {x.shape[1]}")
        with torch.autocast(x.device.type, enabled=False):
            kept = F.dropout(x, self.dropout, self.training)
            # A matrix product: a convolution that fills one channel of hundreds is slow.
            saliency = torch.einsum("bchw,c->bhw", kept, self.saliency.weight.to(x.dtype).flatten())[:, None]
            saliency = _padded(saliency + cast("Tensor", self.saliency.bias).to(x.dtype), stride, window)
            blur = None if self.sigma is None else _gaussian(self.sigma, x)
            if blur is not None:
                saliency = F.conv2d(saliency, blur[None, None])
            # (B, h, w, rows, columns)
            seen = saliency[:, 0].unfold(1, self.kernel_size[0], stride[0]).unfold(2, self.kernel_size[1], stride[1])
            if self.training:
                seen = seen * (torch.rand_like(seen) >= self.dropout)
            logits = seen * self.weight.to(x.dtype) + self.bias.to(x.dtype)
            kernels = logits.flatten(3).softmax(3).unflatten(3, self.kernel_size)
            if blur is not None:
                whole = F.pad(kernels.flatten(0, 2)[:, None], [2 * margin] * 4)
                kernels = F.conv2d(whole, blur[None, None])[:, 0].unflatten(0, kernels.shape[:3])
            kernels = kernels.permute(0, 3, 4, 1, 2).contiguous()
            # Every second pixel of a row is a run of channels in this layout, and one of eight bytes in the other.
            x = x.contiguous(memory_format=torch.channels_last)
            return window_sum(_padded(x, stride, window), kernels, stride).to(features.dtype)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"channels={self.channels}, kernel_size={self.kernel_size}, dropout={self.dropout}, sigma={self.sigma}"


def _checked(what: str, features: Tensor, size: object, window: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The features in float32 at least, and the pixels of a cell."""
    _checks.map_(what, "features", features)
    size, fine = _checks.grid(what, "size", size), tuple(features.shape[2:])
    if any(n % m for n, m in zip(fine, size, strict=True)):
        raise ValueError(f"murf_fast.{what}: `size` must divide that of `features`, {fine}, got {size}")
    stride = fine[0] // size[0], fine[1] // size[1]
    if any(max(_margins(s, k)) >= n for s, k, n in zip(stride, window, fine, strict=True)):
        raise ValueError(
            f"murf_fast.{what}: `features` of {fine} pixels are too small for windows of {window} pixels (with the "
            f"blur's) at cells of {stride}, which reach further out than their mirror image does"
        )
    return features.to(torch.promote_types(features.dtype, torch.float32)), stride


def _margins(stride: int, window: int) -> tuple[int, int]:
    """Pixels that the first window begins before the map, and the last ends behind it; negative inside."""
    before = (window - stride) // 2
    return before, window - stride - before


def _padded(x: Tensor, stride: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """What the windows see: cropped, or mirrored about the middle of the pixels at the border."""
    (top, bottom), (left, right) = (_margins(s, k) for s, k in zip(stride, window, strict=True))
    x = x[:, :, max(-top, 0) :, max(-left, 0) :]
    margins = [max(n, 0) for n in (left, right, top, bottom)]
    return F.pad(x, margins, mode="reflect") if any(margins) else x


def _gaussian(sigma: float, like: Tensor) -> Tensor:
    """(5, 5), of sum one."""
    taps = torch.arange(-_BLUR, _BLUR + 1, dtype=like.dtype, device=like.device)
    taps = torch.softmax(-taps.square() / (2 * sigma**2), 0)
    return taps[:, None] * taps
