from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gaussian_bilateral_radii", "gaussian_bilateral_upsample"]


def gaussian_bilateral_upsample(
    features: Tensor,
    guidance: Tensor,
    low_guidance: Tensor,
    sigma_x: Tensor,
    sigma_y: Tensor,
    theta: Tensor,
    sigma_r: Tensor,
    radius: int,
    radii: Tensor | None = None,
) -> Tensor:
    """Offset after offset of the window: first the logarithms of all weights, then their softmax on the features.

    ``radii`` (B, 1, H, W) are the windows' own; cells beyond the border are those of the border.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    (height, width), (h, w) = guidance.shape[2:], features.shape[2:]
    features, guidance, low, theta = (x.to(dtype) for x in (features, guidance, low_guidance, theta))
    sigma_x, sigma_y, sigma_r = (x.to(dtype).clamp_min(1e-6) for x in (sigma_x, sigma_y, sigma_r))
    cells = [theta.cos(), theta.sin(), 2 * sigma_x**2 + 1e-8, 2 * sigma_y**2 + 1e-8, 2 * sigma_r**2 + 1e-8]
    y, x = (torch.arange(n, dtype=torch.int64, device=features.device) for n in (height, width))
    row, column = (2 * y + 1) * h // (2 * height), (2 * x + 1) * w // (2 * width)
    limit = radius if radii is None else radii.long()
    logs, read = [], []
    for i in range(-radius, radius + 1):
        for j in range(-radius, radius + 1):
            if i * i + j * j > radius * radius:
                continue
            at_y, at_x = (row + i).clamp(0, h - 1), (column + j).clamp(0, w - 1)
            dy = ((y + 0.5).to(dtype) - (at_y + 0.5).to(dtype) * (height / h))[:, None]
            dx = (x + 0.5).to(dtype) - (at_x + 0.5).to(dtype) * (width / w)
            cos, sin, along, across, tone = (c[:, :, at_y][..., at_x] for c in cells)
            difference = (guidance - low[:, :, at_y][..., at_x]).square().sum(1, keepdim=True)
            log = -((dx * cos + dy * sin) ** 2 / along + (dy * cos - dx * sin) ** 2 / across + difference / tone)
            inside = torch.as_tensor(i * i + j * j <= limit * limit, device=log.device)
            logs.append(torch.where(inside, log, -torch.inf))
            read.append((at_y, at_x))
    weights = torch.stack(logs).softmax(0)
    result = torch.zeros_like(features[:, :, :1, :1])
    for weight, (at_y, at_x) in zip(weights, read, strict=True):
        result = result + weight * features[:, :, at_y][..., at_x]
    return result


def gaussian_bilateral_radii(
    sigma_x: Tensor, sigma_y: Tensor, size: tuple[int, int], radius: int, reach: float
) -> Tensor:
    """Windows of ``reach`` times the larger sigma, resized bilinearly, in whole cells from 1 to ``radius``; uint8."""
    larger = torch.maximum(sigma_x, sigma_y).detach()
    larger = larger.to(torch.promote_types(larger.dtype, torch.float32))
    cells = F.interpolate(larger, size, mode="bilinear", align_corners=False).mul_(reach).ceil_()
    return cells.clamp_(1, radius).to(torch.uint8)
