"""Images in a range of their own, as models that normalize inside take them."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import _arguments

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def check_image_range(what: str, image_range: object, channels: int) -> tuple[float, float] | None:
    """(low, high), or None for images that are normalized already."""
    if image_range is None:
        return None
    low, high = _arguments.numbers(what, "image_range", image_range, 2)
    if not low < high:
        raise ValueError(f"murf_fast.{what}: `image_range` must be (low, high) with low < high, got {image_range!r}")
    if channels != len(MEAN):
        raise ValueError(f"murf_fast.{what}: `image_range` needs images of 3 channels, got `input_dim` {channels}")
    return low, high


def imagenet_normalized(image: Tensor, image_range: tuple[float, float]) -> Tensor:
    """``((image - low) / (high - low) - mean) / deviation`` by channel, in float32 at least, in the image's dtype."""
    low, high = image_range
    unit = image.to(torch.promote_types(image.dtype, torch.float32)) * (1 / (high - low)) - low / (high - low)
    # Numbers, not tensors of three: those would be copied to the device at every call.
    channels = [(unit[:, c] - MEAN[c]) / DEVIATION[c] for c in range(len(MEAN))]
    return torch.stack(channels, 1).to(image.dtype)
