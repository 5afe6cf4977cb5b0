from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast.annotations import SmoothMode
from murf_fast.reference._resize import resize_map

__all__ = ["adaptive_conv"]


def adaptive_conv(
    source: Tensor,
    kernels: Tensor,
    size: Sequence[int],
    bias: Tensor | None = None,
    mode: SmoothMode | None = "bicubic",
    padding: str | None = "reflect",
) -> Tensor:
    """Resize, pad, unfold, and contract the windows with the kernels (B, D * D, H, W)."""
    diameter = round(kernels.shape[1] ** 0.5)
    grow = 0 if padding else diameter - 1
    if mode is not None:
        source = resize_map(source, (size[0] + grow, size[1] + grow), mode)
    if padding:
        source = F.pad(source, [diameter // 2] * 4, mode=padding)
    windows = F.unfold(source, diameter).view(*source.shape[:2], diameter**2, *size)
    result = torch.einsum("bcthw,bthw->bchw", windows, kernels.to(source.dtype))
    return result if bias is None else result + bias.to(result.dtype).view(1, -1, 1, 1)
