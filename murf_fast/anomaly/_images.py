"""Images as the detector takes them, and the size it looks at them in."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from murf_fast.nn import MultiResolutionEncoder
from murf_fast.nn.vit import _images
from murf_fast.ops.resize import resize

WHAT = "murf_fast.MultiResolutionDetector"
KINDS = "a tensor (3, H, W), an array (H, W, 3), a gray one of either, a PIL image or the path of an image file"
CHANNELS = (1, 3, 4)  # gray; colours; colours and alpha, which is dropped as that of files is
SAMPLES = 64  # pixels of an axis that are looked at before any work
# Share of the wanted pixels by which a size may be off: in the paper's table sheet_metal stays at 0.892 of them, and
# vial is brought to 0.899, not to 1.197 by the rounder factor 3/2.
NEAR_ENOUGH = 1 / 8
ARRAYS = (np.uint8, np.uint16, np.float16, np.float32, np.float64)


def as_tensor(image: Any, name: str = "an image") -> Tensor:
    """(1, 3, H, W), uint8 or floating point in [0, 1], of any of ``KINDS``; a path is read."""
    if isinstance(image, (str, os.PathLike)):
        from murf_fast import _pillow

        image = _pillow.read(image)
    elif _is_pil(image):
        from murf_fast import _pillow

        image = _pillow.rgb(image, name)
    size_of(image, name)
    if isinstance(image, np.ndarray):
        # A copy: arrays of images are often read-only.
        image = torch.from_numpy(np.array(image, dtype=image.dtype.newbyteorder("="), order="C"))
        image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
    image = image[None] if image.ndim == 2 else image
    image = image[None] if image.ndim == 3 else image
    if image.dtype == torch.uint16:  # as files of 16 bits are read
        image = (image.float() / 257).round().to(torch.uint8)
    if image.is_floating_point() and not bool(image.isfinite().all()):
        raise ValueError(f"{WHAT}: {name} must be finite, got NaN or infinite pixels")
    return image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image[:, :3]


def check_values(image: Any, encoder: MultiResolutionEncoder, name: str = "an image") -> None:
    """Refuses values that are in no image which ``encoder`` takes, by a sample of the pixels in memory."""
    if isinstance(image, (str, os.PathLike)) or _is_pil(image):
        return
    rows, columns = (-(-n // SAMPLES) for n in size_of(image, name))
    sample = image[::rows, ::columns] if isinstance(image, np.ndarray) else image[..., ::rows, ::columns]
    options: dict[str, Any] = {"mean": encoder.resize["mean"], "std": encoder.resize["std"], "name": name}
    options["normalizes"] = encoder.family.kind.normalizes
    _images.check_values("MultiResolutionDetector", as_tensor(sample, name), encoder.model, **options)


def size_of(image: Any, name: str = "an image") -> tuple[int, int] | Any:
    """(height, width) of an image in memory, checked without a look at its pixels; None for a path."""
    if isinstance(image, (str, os.PathLike)):
        return None
    if _is_pil(image):
        return image.height, image.width
    if isinstance(image, np.ndarray):
        fits = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in CHANNELS)
        if not fits or image.size == 0 or image.dtype.newbyteorder("=") not in ARRAYS:
            raise ValueError(
                f"{WHAT}: {name} must be (H, W, 3), (H, W, 4) or (H, W), uint8, uint16 or floating point, got "
                f"{image.dtype} {image.shape}"
            )
        return image.shape[:2]
    if not isinstance(image, Tensor):
        raise TypeError(f"{WHAT}: {name} must be {KINDS}, got {type(image).__name__}")
    channels = image.shape[1 if image.ndim == 4 and len(image) == 1 else 0] if image.ndim > 2 else 1
    if image.ndim not in (2, 3, 4) or channels not in CHANNELS or image.numel() == 0:
        raise ValueError(
            f"{WHAT}: {name} must be a tensor (3, H, W), (4, H, W), (1, H, W) or (H, W), got shape {tuple(image.shape)}"
        )
    if image.dtype not in (torch.uint8, torch.uint16) and not image.is_floating_point():
        raise TypeError(f"{WHAT}: {name} must be uint8, uint16 or floating point, got {image.dtype}")
    return image.shape[-2], image.shape[-1]


def sizes_of_files(images: Sequence[Any], sizes: list[Any]) -> list[tuple[int, int]]:
    """``sizes``, with those of the files among ``images``, each of which is decoded; a ValueError names what is not."""
    paths = [image for image, size in zip(images, sizes, strict=True) if size is None]
    if not paths:
        return sizes
    from murf_fast import _pillow

    found: Any = _pillow.survey(paths)
    wrong = [error for error in found if isinstance(error, Exception)]
    if wrong:
        more = f" (and {len(wrong) - 1} more of {len(paths)} files)" if len(wrong) > 1 else ""
        raise ValueError(f"{WHAT}: {wrong[0]}{more}") from wrong[0]
    found = iter(found)
    return [next(found) if size is None else size for size in sizes]


def many(images: Any) -> Any:
    """What :meth:`fit` may go through; one image by itself is refused, its rows are no images."""
    single = isinstance(images, (str, os.PathLike)) or _is_pil(images)
    if isinstance(images, (Tensor, np.ndarray)):
        single = images.ndim != 4
    if single or not hasattr(images, "__iter__"):
        raise TypeError(
            f"{WHAT}: `images` must be several images, such as a list or a generator; each {KINDS}, got "
            f"{_described(images)}"
        )
    return images


@dataclasses.dataclass(frozen=True)
class Size:
    """The size that images are looked at in; the attributes are those of :class:`MultiResolutionDetector`."""

    pixels: float | None
    enlarge: bool = False
    shorter_side: int | None = None

    def of(self, height: int, width: int) -> tuple[int, int]:
        """That of an image of (height, width)."""
        if self.shorter_side is not None:
            shorter = min(height, width)
            return max(1, height * self.shorter_side // shorter), max(1, width * self.shorter_side // shorter)
        keeps = self.pixels is not None and not self.enlarge and height * width <= self.pixels
        return (height, width) if keeps else prescaled_size(height, width, self.pixels)

    def prescaled(self, image: Tensor) -> Tensor:
        """The image (1, 3, H, W) at it. Of another size it is floating point, in [0, 1]."""
        height, width = image.shape[2:]
        size = self.of(height, width)
        if size == (height, width):
            return image
        if image.dtype == torch.uint8:
            image = image.float() / 255
        if self.shorter_side is not None:
            # Where the cubic overshoots it leaves the range of pixels, as no image does.
            least, most = min(0.0, float(image.min())), max(1.0, float(image.max()))
            return resize(image, size, mode="bicubic", antialias=True).clamp(least, most)
        return resize(image, size, mode="bilinear", antialias=cast("float", self.pixels) < height * width)


def prescaled_size(height: int, width: int, pixels: float | None) -> tuple[int, int]:
    """The size at about ``pixels`` pixels, larger or smaller; ``None`` leaves it.

    Sides are multiplied by the roundest factor that brings the image within an eighth of so many pixels: of the
    multiples of 1, else of 1/2, 1/4, 1/10, 1/20, 1/40, 1/100, ... the smallest. So 1024 x 2232 becomes 1536 x 3348
    (3/2), 1520 x 2100 becomes 1900 x 2625 (5/4), 1900 x 1400 becomes 2470 x 1820 (13/10), and what is near enough
    stays: MRF-AD's Table 5, of which the paper says no rule.
    """
    if pixels is None:
        return height, width
    numerator, denominator = _round_factor(max(pixels, 1.0) / (height * width))
    rows, columns = (max(1, (2 * n * numerator + denominator) // (2 * denominator)) for n in (height, width))
    return rows, columns


def _round_factor(share: float) -> tuple[int, int]:
    """The roundest factor of the sides, as a fraction, that multiplies the pixels by about ``share``."""
    low, high = ((share * (1 + sign * NEAR_ENOUGH)) ** 0.5 for sign in (-1, 1))
    for denominator in (round_one * 10**power for power in itertools.count() for round_one in (1, 2, 4)):
        numerator = math.ceil(low * denominator)
        if numerator <= high * denominator:
            return numerator, denominator
    raise AssertionError("a factor of enough digits is near enough")


def _is_pil(image: object) -> bool:
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(image, pil.Image)


def _described(images: object) -> str:
    if isinstance(images, (Tensor, np.ndarray)):
        return f"one {type(images).__name__} of shape {tuple(images.shape)}"
    return type(images).__name__
