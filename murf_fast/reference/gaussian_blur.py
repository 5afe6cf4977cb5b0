from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from murf_fast.tables.gaussian import gaussian_taps, mirrored

__all__ = ["gaussian_blur"]


def gaussian_blur(x: Tensor, sigma: float, border: str = "symmetric") -> Tensor:
    """Every axis in turn: the weighted sum of shifted copies of the mirrored map, in float32 or wider.

    Memory: three maps in that dtype.
    """
    result = x.to(torch.promote_types(x.dtype, torch.float32))
    for dim in (2, 3):
        size = x.shape[dim]
        offset, taps = gaussian_taps(size, sigma, border)
        index = mirrored(offset + np.arange(size + len(taps) - 1), size, border)
        padded = result.index_select(dim, torch.from_numpy(index).to(x.device))
        result = torch.zeros_like(result)
        for shift, tap in enumerate(taps.tolist()):
            result.add_(padded.narrow(dim, shift, size), alpha=tap)
    return result.to(x.dtype)
