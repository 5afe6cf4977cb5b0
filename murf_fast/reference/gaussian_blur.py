from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast.resample import gaussian_radius, mirrored


def gaussian_blur(x: Tensor, sigma: float, border: str = "symmetric") -> Tensor:
    """One dense two-dimensional convolution of the padded map, cut off at four sigma."""
    radius = gaussian_radius(sigma)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64, device="cpu") / sigma) ** 2)
    taps = (taps / taps.sum()).to(x)
    for dim in (2, 3):
        size = x.shape[dim]
        index = mirrored(np.arange(-radius, size + radius), size, border)
        x = x.index_select(dim, torch.from_numpy(index).to(x.device))
    planes = x.flatten(0, 1)[:, None]
    return F.conv2d(planes, torch.outer(taps, taps)[None, None]).view(
        *x.shape[:2], *(n - 2 * radius for n in x.shape[2:])
    )
