from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from murf_fast.annotations import Mode
from murf_fast.reference._resize import resize_map

__all__ = ["resize_gram"]


def resize_gram(x: Tensor, size: Sequence[int], mode: Mode = "bilinear", antialias: bool = False) -> Tensor:
    """``(U_h^T U_h) x (U_w^T U_w)`` with the dense matrices of ``resize(x, size)``."""

    def gram(n: int, m: int) -> Tensor:
        identity = torch.eye(n, dtype=x.dtype, device=x.device).view(n, 1, n, 1)
        columns = resize_map(identity, (m, 1), mode, antialias).view(n, m)
        return columns @ columns.mT

    height, width = x.shape[2:]
    return gram(height, size[0]) @ x @ gram(width, size[1])
