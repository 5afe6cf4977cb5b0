from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["bilateral_kernels"]


def bilateral_kernels(
    guidance: Tensor,
    params: Sequence[Tensor],
    radius: int = 3,
    range_mask: Tensor | None = None,
    fixup_mask: Tensor | None = None,
) -> Tensor:
    """Per-pixel kernels (B, D * D, H, W), D = 2 * radius + 1, of a guidance (B, G, H, W); through an unfold.

    ``params`` are the entries of :class:`murf_fast.BilateralParams` without those that are None.
    """
    params = [p.to(guidance.dtype) for p in params]
    temp, sigma, weight0, bias0, weight1, bias1 = params[:6]
    diameter = 2 * radius + 1
    batch, _, height, width = guidance.shape

    hidden = F.gelu(F.conv2d(guidance, weight0.flatten(1)[..., None, None], bias0))
    projected = F.conv2d(_masked(hidden, range_mask), weight1.flatten(1)[..., None, None], bias1)
    windows = F.unfold(F.pad(projected, [radius] * 4, mode="reflect"), diameter)
    windows = windows.view(batch, projected.shape[1], diameter**2, height, width)
    logits = torch.einsum("bcthw,bchw->bthw", windows, projected)
    similarity = torch.softmax(temp.exp().clamp(1e-4, 1e4) * logits, dim=1)

    offset = torch.linspace(-1, 1, diameter, dtype=guidance.dtype, device=guidance.device)
    spatial = torch.exp(-(offset[:, None] ** 2 + offset**2) / (2 * sigma**2)).view(1, -1, 1, 1)
    kernels = similarity * spatial
    kernels = kernels / kernels.sum(1, keepdim=True).clamp(1e-7)
    if len(params) == 6:
        return kernels
    weight0, bias0, weight1, bias1 = params[6:]
    hidden = F.gelu(F.conv2d(torch.cat([kernels, guidance], 1), weight0.flatten(1)[..., None, None], bias0))
    return kernels + 0.1 * F.conv2d(_masked(hidden, fixup_mask), weight1.flatten(1)[..., None, None], bias1)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask[..., None, None].to(x.dtype)
