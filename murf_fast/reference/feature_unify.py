from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["feature_unify"]


def feature_unify(features: Tensor, basis: Tensor, variant: str = "released") -> Tensor:
    """Correlation of every channel with every filter, mean over the taps inside, softmax, mean; (B, M, h, w)."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    batch, channels, height, width = features.shape
    filters, radius = len(basis), basis.shape[-1] // 2
    kernel = basis.to(dtype).reshape(filters, 1, *basis.shape[-2:])
    single = features.to(dtype).reshape(batch * channels, 1, height, width)
    inside = F.conv2d(torch.ones_like(single[:1]), torch.ones_like(kernel[:1]), padding=radius)
    responses = (F.conv2d(single, kernel, padding=radius) / inside).view(batch, channels * filters, height, width)
    if variant == "released":
        # The grouped convolution's channels, (channel, filter) in order, read as (filter, channel).
        return responses.view(batch, filters, channels, height, width).softmax(1).mean(2)
    return responses.view(batch, channels, filters, height, width).softmax(2).mean(1)
