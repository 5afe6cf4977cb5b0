"""Score maps whose cells are enlarged to squares of pixels and smoothed: one matrix per axis."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from murf_fast.tables.gaussian import gaussian_axis
from murf_fast.tables.resize import axis, is_large


def blurred_cells(x: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """``G_h U_h x U_w^T G_w^T``: nearest-neighbour upsampling ``U``, Gaussian ``G`` with the border ``"reflect"``.

    Both are linear, so their product is as wide as the map has cells: few, and the matrix products are small.

    Memory: the result in float32 and in the dtype of ``x``, and a map of its height and the width of ``x``.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    down, across = (
        _matrix(n, to, sigma, is_large("nearest", size), dtype, x.device)
        for n, to in zip(x.shape[2:], size, strict=True)
    )
    with torch.autocast(x.device.type, enabled=False):
        return ((down @ x.to(dtype)) @ across.T).to(x.dtype)


@lru_cache(maxsize=64)
def _matrix(n: int, size: int, sigma: float, large: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    product = gaussian_axis(size, sigma, "reflect").dense() @ axis(n, size, "nearest", large=large).dense()
    with torch.inference_mode(False):
        return torch.from_numpy(product).to(device, dtype)
