from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from murf_fast.annotations import SmoothMode
from murf_fast.reference._resize import resize_map

__all__ = ["resample_patch_embed", "resample_pos_embed"]


def resample_pos_embed(
    table: Tensor,
    grid: Sequence[int],
    mode: SmoothMode,
    antialias: bool,
    scale_factor: Sequence[float] | None = None,
) -> Tensor:
    """A position table (M_h, M_w, D) at ``grid`` (h, w): rows (h * w, D)."""
    resized = resize_map(table.permute(2, 0, 1)[None], grid, mode, antialias, None, scale_factor)
    return resized[0].flatten(1).T


def resample_patch_embed(
    weight: Tensor, size: Sequence[int], mode: SmoothMode = "bicubic", antialias: bool = True
) -> Tensor:
    """``weight_flat pinv(B)`` with B the matrix (P'^2, P^2) that resizes a patch."""
    height, width = weight.shape[2:]
    basis = torch.eye(height * width, dtype=weight.dtype, device=weight.device).view(-1, 1, height, width)
    matrix = resize_map(basis, size, mode, antialias).flatten(1).T
    return (weight.flatten(2) @ torch.linalg.pinv(matrix)).unflatten(2, tuple(size))
