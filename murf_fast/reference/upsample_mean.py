from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from murf_fast.annotations import Mode
from murf_fast.reference._resize import resize_map

__all__ = ["upsample_mean"]


def upsample_mean(
    maps: Sequence[Tensor],
    size: Sequence[int],
    weights: Sequence[float] | Tensor | None = None,
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: Sequence[int] | None = None,
) -> Tensor:
    """``sum(w * resize(m, size)) / sum(w)``."""
    weights = [1.0] * len(maps) if weights is None else weights
    resized = [w * resize_map(m, size, mode, antialias, via) for w, m in zip(weights, maps, strict=True)]
    return sum(resized) / sum(weights)
