from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from murf_fast.annotations import Mode
from murf_fast.reference.upsample_sum import upsample_sum

__all__ = ["upsample_argmax"]


def upsample_argmax(
    features: Sequence[Tensor],
    size: Sequence[int],
    bias: Tensor | None = None,
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(labels, values)`` of ``upsample_sum(...).max(dim=1)``; labels are int64."""
    values, labels = upsample_sum(features, size, bias, mode, antialias, via).max(dim=1)
    return labels, values
