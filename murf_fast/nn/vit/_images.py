"""What the encoders ask of images before any work: type, layout, and values that can be those of an image."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from murf_fast.ops import _checks

# No normalization of an image reaches this: ImageNet's ends at 2.7, and 0..255 taken for 0..1 is far beyond.
MOST = 20.0
# Pixels of an axis that are looked at.
_SAMPLES = 64

_looked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def size_of(what: str, images: object, name: str | None = None) -> tuple[int, int]:
    """(height, width) of images (B, 3, H, W) or (B, H, W, 3), uint8 or floating point; of one image with a ``name``."""
    if not isinstance(images, Tensor):
        raise TypeError(f"murf_fast.{what}: `images` must be a tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8 and images.dtype not in _checks.DTYPES:
        raise TypeError(
            f"murf_fast.{what}: {name or '`images`'} must be uint8 (0 to 255) or floating point (0 to 1), got "
            f"{images.dtype}"
        )
    # Comparisons one by one: sizes may be symbolic, of which `in` and `min` do not ask what they are.
    is_first = images.ndim == 4 and images.shape[1] == 3
    if not (is_first or (images.ndim == 4 and images.shape[3] == 3)) or any(n < 1 for n in images.shape[1:]):
        shapes, got = ("(B, 3, H, W) or (B, H, W, 3)", images.shape)
        if name is not None:
            shapes, got = "(3, H, W) or (H, W, 3)", images.shape[1:]
        raise ValueError(f"murf_fast.{what}: {name or '`images`'} must be {shapes} with H, W >= 1, got {tuple(got)}")
    height, width = images.shape[2:] if is_first else images.shape[1:3]
    return height, width


def as_floats(images: Tensor) -> Tensor:
    """Images of :func:`size_of` as (B, 3, H, W) in float32 at least, uint8 divided by 255."""
    images = images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
    if images.dtype == torch.uint8:
        return images.to(torch.float32) / 255
    return images.to(torch.promote_types(images.dtype, torch.float32))


def three_numbers(what: str, name: str, value: Any) -> list[float] | None:
    """``mean`` or ``std`` as floats; None stays."""
    if value is None:
        return None
    try:
        numbers = [] if any(isinstance(v, (bool, np.bool_)) for v in value) else [float(v) for v in value]
    except (TypeError, ValueError):
        numbers = []
    least = 0 if name == "std" else -math.inf
    if len(numbers) != 3 or not all(least < v < math.inf for v in numbers):
        kind = "three numbers > 0" if name == "std" else "three numbers"
        raise ValueError(f"murf_fast.{what}: `{name}` must be {kind}, got {value!r}")
    return numbers


def check_values(
    what: str,
    images: Tensor,
    model: nn.Module,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    name: str = "`images`",
    *,
    normalizes: bool = False,
) -> None:
    """Refuses values that no normalized image has, and warns once per model of images that nobody normalized.

    A sample of the pixels is looked at: on CPUs in every call, elsewhere, where it has to be waited for, in a model's
    first; never while a graph is compiled or captured. ``normalizes``: the model does so itself.
    """
    if images.dtype == torch.uint8:
        if mean is not None and max(mean) > 1:
            raise ValueError(
                f"murf_fast.{what}: `mean` and `std` must be in the unit of pixels divided by 255 for uint8 images, "
                f"got a mean of {tuple(mean)}"
            )
        if mean is None and std is None and not normalizes:
            _warn_once(what, model)
        return
    if torch.compiler.is_compiling() or images.device.type == "meta" or images.numel() == 0:
        return
    if images.device.type != "cpu":
        if model in _looked or (images.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        _looked.add(model)
    pixels = images.detach() if images.shape[1] == 3 else images.detach().permute(0, 3, 1, 2)
    rows, columns = (-(-n // _SAMPLES) for n in pixels.shape[2:])
    low, high = (float(v) for v in pixels[:, :, ::rows, ::columns].aminmax())
    if mean is None and std is None and not normalizes and low >= 0 and 0 < high <= 1:
        _warn_once(what, model)
    means, stds = mean or [0.0] * 3, std or [1.0] * 3
    reach = max(max((high - m) / s, (m - low) / s) for m, s in zip(means, stds, strict=True))
    if reach > MOST:
        raise ValueError(
            f"murf_fast.{what}: {name} must be in 0..1, as floating-point pixels are, or normalized, but holds values "
            f"from {low:g} to {high:g}, up to {reach:.0f} deviations from the mean; divide them by 255 or pass uint8 "
            "(or give `mean` and `std` in their unit)"
        )


def _warn_once(what: str, model: nn.Module) -> None:
    if torch.compiler.is_compiling() or model in _warned:
        return
    _warned.add(model)
    warnings.warn(
        f"murf_fast.{what}: images in 0..1 or uint8 come to {type(model).__name__} without `mean` and `std`; "
        "pretrained models want normalized ones. Pass the mean and deviation of its preprocessor (DINOv2 and DINOv3: "
        "mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225); CLIP: mean=(0.481, 0.458, 0.408), std=(0.269, 0.261, "
        "0.276); SigLIP: 0.5 three times each), or zeros and ones to "
        "leave images as they are",
        UserWarning,
        stacklevel=8,
    )
