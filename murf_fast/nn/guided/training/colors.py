"""Random changes of colour, sharpness and noise that leave everything in its place."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast import _arguments
from murf_fast.ops import _checks

_LUMA = (0.299, 0.587, 0.114)
_BLUR, _SIGMA = 2, (0.3, 1.5)  # taps to each side; pixels
_NOISE = 0.03


@torch.no_grad()
def augment_colors(images: Tensor, strength: float = 1.0, *, generator: torch.Generator | None = None) -> Tensor:
    """Images in other colours, for :func:`self_consistency_loss`: every pixel stays where it is.

    Each image goes through the steps in this order, each with probability ``p ** (1 / strength)``: jitter of
    brightness, contrast, saturation and hue (0.5), stronger jitter of contrast and saturation (0.25), another order of
    the channels (0.25), grey (0.1), a blur of sigma 0.3 to 1.5 pixels (0.35), stretched contrast (0.2), sharpening
    (0.2), 5 bits per channel (0.1), solarization above 0.9 (0.05), inversion (0.02), noise of deviation 0.03 (0.6).
    Values are cut to 0..1 after each step.

    Args:
        images: (B, 3, H, W) in 0..1, floating point, before the normalization; 3 rows and columns at least.
        strength: Above 0; larger ones change more images.
        generator: On the CPU; None: torch's own.

    Returns:
        New images of the same shape, dtype and device, without gradients.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: the result, and about ten copies of the images that a step changes.

    Source: AnyUp, appendix C.1, with the probabilities of its training code; without that code's JPEG artefacts and
    equalized histograms, and with hues turned about the grey axis rather than in HSV.
    """
    op = "augment_colors"
    _checks.map_(op, "images", images)
    strength = _arguments.number(op, "strength", strength)
    _arguments.generator(op, generator)
    if strength <= 0:
        raise ValueError(f"murf_fast.{op}: `strength` must be above 0, got {strength}")
    if images.shape[1] != 3 or min(images.shape[2:]) < 3:
        raise ValueError(
            f"murf_fast.{op}: `images` must have 3 channels, and 3 rows and columns, got {tuple(images.shape)}"
        )
    result = images.to(torch.promote_types(images.dtype, torch.float32), copy=True)
    for chance, step in STEPS:
        chosen = _uniform((len(images),), generator) < chance ** (1 / strength)
        if chosen.any():
            chosen = chosen.to(images.device)
            result[chosen] = step(result[chosen], _Random(result, int(chosen.sum()), generator)).clamp(0, 1)
    return result.to(images.dtype)


class _Random:
    """Draws for ``count`` images, made on the CPU: the same on every device."""

    def __init__(self, like: Tensor, count: int, generator: torch.Generator | None) -> None:
        self._like, self._count, self._generator = like, count, generator

    def uniform(self, low: float, high: float) -> Tensor:
        """(count, 1, 1, 1)."""
        drawn = _uniform((self._count, 1, 1, 1), self._generator)
        return (low + (high - low) * drawn).to(self._like)

    def normal(self, x: Tensor) -> Tensor:
        drawn = torch.randn(x.shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return drawn.to(self._like)

    def orders(self) -> Tensor:
        """(count, 3), permutations."""
        return _uniform((self._count, 3), self._generator).argsort(1).to(self._like.device)


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def _jitter(x: Tensor, random: _Random) -> Tensor:
    x = (x * random.uniform(0.8, 1.2)).clamp(0, 1)
    x = contrasted(x, random.uniform(0.8, 1.2)).clamp(0, 1)
    x = saturated(x, random.uniform(0.7, 1.3)).clamp(0, 1)
    return turned(x, random.uniform(-0.05, 0.05))


def _distort(x: Tensor, random: _Random) -> Tensor:
    x = contrasted(x, random.uniform(0.5, 1.5)).clamp(0, 1)
    return saturated(x, random.uniform(0.5, 1.5))


def _reorder(x: Tensor, random: _Random) -> Tensor:
    return x.gather(1, random.orders()[:, :, None, None].expand_as(x))


def _blur(x: Tensor, random: _Random) -> Tensor:
    return blurred(x, random.uniform(*_SIGMA))


def _stretch(x: Tensor, random: _Random) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low), x)


def _noise(x: Tensor, random: _Random) -> Tensor:
    return x + _NOISE * random.normal(x)


STEPS: tuple[tuple[float, Callable[[Tensor, _Random], Tensor]], ...] = (
    (0.5, _jitter),
    (0.25, _distort),
    (0.25, _reorder),
    (0.1, lambda x, _: grey(x).expand_as(x)),
    (0.35, _blur),
    (0.2, _stretch),
    (0.2, lambda x, _: sharpened(x, 1.5)),
    (0.1, lambda x, _: (x * 255).floor().div(8).floor() * 8 / 255),
    (0.05, lambda x, _: torch.where(x >= 0.9, 1 - x, x)),
    (0.02, lambda x, _: 1 - x),
    (0.6, _noise),
)


def grey(x: Tensor) -> Tensor:
    """(n, 1, H, W), Rec. 601."""
    r, g, b = x.split(1, 1)
    return _LUMA[0] * r + _LUMA[1] * g + _LUMA[2] * b


def contrasted(x: Tensor, factor: Tensor) -> Tensor:
    """About the mean grey of each image."""
    mean = grey(x).mean((2, 3), keepdim=True)
    return mean + factor * (x - mean)


def saturated(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(grey(x).expand_as(x), x, factor)


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Colours turned about the grey axis by a share of the circle."""
    angle = 2 * math.pi * turns
    mean, (r, g, b) = x.mean(1, keepdim=True), x.split(1, 1)
    across = torch.cat([b - g, r - b, g - r], 1) / math.sqrt(3)
    return mean + angle.cos() * (x - mean) + angle.sin() * across


def blurred(x: Tensor, sigma: Tensor) -> Tensor:
    """A Gaussian of five taps for each axis, borders reflected; ``sigma`` (n, 1, 1, 1)."""
    count, channels = x.shape[:2]
    taps = torch.arange(-_BLUR, _BLUR + 1, dtype=x.dtype, device=x.device)
    kernel = torch.softmax(-taps.square() / (2 * sigma.square()), -1).repeat_interleave(channels, 0)
    x = F.pad(x.reshape(1, count * channels, *x.shape[2:]), [_BLUR] * 4, mode="reflect")
    x = F.conv2d(F.conv2d(x, kernel, groups=count * channels), kernel.mT, groups=count * channels)
    return x.unflatten(1, (count, channels))[0]


def sharpened(x: Tensor, factor: float) -> Tensor:
    """Away from a 3 x 3 mean whose middle counts five times; the border stays."""
    kernel = x.new_ones(1, 1, 3, 3)
    kernel[0, 0, 1, 1] = 5
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(x, (kernel / 13).expand(3, 1, 3, 3), groups=3)
    return smooth + factor * (x - smooth)
