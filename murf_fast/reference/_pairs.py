from __future__ import annotations

import torch
from torch import Tensor


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(..., m, n) of points (..., m, C) and (..., n, C); a product, as of matrices, of points about a common middle."""
    middle = a.mean(-2, keepdim=True).detach()
    a, b = a - middle, b - middle
    squares = a.square().sum(-1)[..., None] + b.square().sum(-1)[..., None, :]
    return torch.clamp(squares - 2 * a @ b.mT, min=0)
