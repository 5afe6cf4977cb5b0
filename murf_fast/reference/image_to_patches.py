from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from murf_fast.annotations import Mode
from murf_fast.reference._resize import resize_map

__all__ = ["image_to_patches"]


def image_to_patches(
    images: Tensor,
    size: Sequence[int],
    patch_size: int,
    gain: Sequence[float],
    offset: Sequence[float],
    mode: Mode = "bilinear",
    antialias: bool = False,
    layout: str = "cyx",
) -> Tensor:
    """Normalize ``images * gain + offset``, resize, cut: rows (B, N, 3 p p) of a (B, 3, H, W) floating-point batch."""
    normalized = torch.stack([images[:, c] * gain[c] + offset[c] for c in range(3)], 1)
    resized = resize_map(normalized, size, mode, antialias)
    height, width = size[0] // patch_size, size[1] // patch_size
    cut = resized[:, :, : height * patch_size, : width * patch_size]
    cut = cut.reshape(-1, 3, height, patch_size, width, patch_size)
    order = (0, 2, 4, 1, 3, 5) if layout == "cyx" else (0, 2, 4, 3, 5, 1)
    return cut.permute(order).reshape(-1, height * width, 3 * patch_size * patch_size)
