from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from murf_fast.annotations import Mode
from murf_fast.reference._resize import resize_map

__all__ = ["upsample_concat"]


def upsample_concat(
    features: Sequence[Tensor],
    size: Sequence[int],
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: Sequence[int] | None = None,
) -> Tensor:
    """``cat([resize(f, size) for f in features], dim=1)``."""
    return torch.cat([resize_map(f, size, mode, antialias, via) for f in features], dim=1)
