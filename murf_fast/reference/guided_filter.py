from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast.reference._resize import averaged


def guided_filter(source: Tensor, guidance: Tensor, radius: int, eps: float) -> Tensor:
    """Algorithm 1 of the guided filter's paper, of any number of guides; (B, C, H, W).

    A guidance larger than the source is averaged to its grid, and the coefficients are upsampled.
    """
    size, grid, guides = guidance.shape[2:], source.shape[2:], guidance.shape[1]
    i, p = averaged(guidance, grid), source
    mean_i, mean_p = _box(i, radius), _box(p, radius)
    corr_ii, corr_ip = (_box((i[:, :, None] * x[:, None]).flatten(1, 2), radius) for x in (i, p))
    var = corr_ii.unflatten(1, (guides, -1)) - mean_i[:, :, None] * mean_i[:, None]
    cov = corr_ip.unflatten(1, (guides, -1)) - mean_i[:, :, None] * mean_p[:, None]
    diagonal = eps * torch.eye(guides, dtype=source.dtype, device=source.device)
    a = torch.linalg.solve(var.permute(0, 3, 4, 1, 2) + diagonal, cov.permute(0, 3, 4, 1, 2)).permute(0, 3, 4, 1, 2)
    b = mean_p - (a * mean_i[:, :, None]).sum(1)
    mean_a, mean_b = _box(a.flatten(1, 2), radius), _box(b, radius)
    mean_a, mean_b = (F.interpolate(x, size, mode="bilinear", align_corners=False) for x in (mean_a, mean_b))
    return (mean_a.unflatten(1, (guides, -1)) * guidance[:, :, None]).sum(1) + mean_b


def _box(x: Tensor, radius: int) -> Tensor:
    return F.avg_pool2d(x, 2 * radius + 1, 1, radius, count_include_pad=False)
