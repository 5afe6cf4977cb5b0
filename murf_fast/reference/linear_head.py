from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from murf_fast.annotations import Mode
from murf_fast.reference._resize import resize_map

__all__ = ["linear_head"]


def linear_head(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    via: Sequence[int] | None = None,
    norm: _BatchNorm | None = None,
    cls: Sequence[Tensor | None] | None = None,
    mode: Mode = "bilinear",
    antialias: bool = False,
) -> Tensor:
    """``conv1x1(norm(cat(resize(f), cls, ...)))`` at ``via`` and then resized to ``size``, or all of it at ``size``."""
    grid = via or size
    columns = []
    for i, feature in enumerate(features):
        columns.append(resize_map(feature, grid, mode, antialias))
        tokens = None if cls is None else cls[i]
        if tokens is not None:
            columns.append(tokens[:, :, None, None].expand(-1, -1, *grid))
    x = torch.cat(columns, dim=1)
    if norm is not None:
        # The forward of the base class: SyncBatchNorm's own refuses to train on CPU, where it is an ordinary one.
        x = _BatchNorm.forward(norm, x)
    logits = F.conv2d(x, weight.reshape(*weight.shape[:2], 1, 1), None if bias is None else bias.to(weight.dtype))
    return resize_map(logits, size, mode, antialias) if via else logits
