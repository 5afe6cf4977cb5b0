"""Images as the detector takes them, and the size it looks at them in."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from murf_fast.ops.resize import resize

# A size this near to the wanted one stays: sheet_metal's 4.5 Mpx in the paper's table do.
TOLERANCE = 0.1


def as_tensor(image: object) -> Tensor:
    """(1, 3, H, W), uint8 or floating point in [0, 1]: of such a tensor, (3, H, W), an (H, W, 3) array or PIL image."""
    if not isinstance(image, Tensor):
        array = np.array(image)  # a copy: arrays of images are often read-only
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype.kind not in "uf":
            raise ValueError(
                f"murf_fast.MultiResolutionDetector: an image must be (H, W, 3), got {array.dtype} {array.shape}"
            )
        image = torch.from_numpy(array).permute(2, 0, 1)
    if image.ndim == 3:
        image = image[None]
    if image.ndim != 4 or image.shape[:2] != (1, 3):
        raise ValueError(
            f"murf_fast.MultiResolutionDetector: an image must be a tensor (3, H, W), got shape {tuple(image.shape)}"
        )
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(
            f"murf_fast.MultiResolutionDetector: an image must be uint8 or floating point, got {image.dtype}"
        )
    return image


def prescaled(image: Tensor, pixels: float | None) -> Tensor:
    """The image at about ``pixels`` pixels, larger or smaller; near enough ones and ``None`` leave it."""
    if pixels is None:
        return image
    height, width = image.shape[2:]
    factor = math.sqrt(pixels / (height * width))
    if abs(factor - 1) <= TOLERANCE:
        return image
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    if image.dtype == torch.uint8:
        image = image.float() / 255
    return resize(image, size, mode="bilinear", antialias=factor < 1)
