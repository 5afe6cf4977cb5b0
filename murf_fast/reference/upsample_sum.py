from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from murf_fast.annotations import Mode
from murf_fast.reference._resize import resize_map

__all__ = ["upsample_sum"]


def upsample_sum(
    features: Sequence[Tensor],
    size: Sequence[int],
    bias: Tensor | None = None,
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: Sequence[int] | None = None,
) -> Tensor:
    """``sum(resize(f, size) for f in features) + bias`` with bias (C,) or (B, C)."""
    total: Any = sum(resize_map(f, size, mode, antialias, via) for f in features)
    if bias is None:
        return total
    return total + bias.to(total.dtype).reshape(-1, bias.shape[-1], 1, 1)
