from __future__ import annotations

import torch
from torch import Tensor

from murf_fast.reference._resize import averaged


def fixed_jbu(source: Tensor, guidance: Tensor, sigma_spatial: float, sigma_range: float, radius: int) -> Tensor:
    """Joint bilateral upsampling with two Gaussians, from all weights of all pixels; (B, C, H, W).

    The square of the guidance's differences is expanded, without the term that the normalization cancels.
    """
    size, grid = guidance.shape[2:], source.shape[2:]
    at = [
        (torch.arange(n, dtype=guidance.dtype, device=guidance.device) + 0.5) * m / n - 0.5
        for n, m in zip(size, grid, strict=True)
    ]
    away = [p[:, None] - torch.arange(m, dtype=p.dtype, device=p.device) for p, m in zip(at, grid, strict=True)]
    spatial = [(-(d**2) / (2 * sigma_spatial**2)).masked_fill(d.abs() > radius, -torch.inf) for d in away]
    spatial = (spatial[0][:, None, :, None] + spatial[1][None, :, None]).flatten(2).flatten(0, 1)
    guidance = guidance - guidance.mean((2, 3), keepdim=True)
    keys = averaged(guidance, grid).flatten(2)
    products = guidance.flatten(2).mT @ keys
    scores = (products - keys.square().sum(1, keepdim=True) / 2) / sigma_range**2 + spatial
    return (source.flatten(2) @ scores.softmax(2).mT).unflatten(2, size)
