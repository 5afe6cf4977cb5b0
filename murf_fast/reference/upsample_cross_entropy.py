from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from murf_fast.annotations import Mode
from murf_fast.reference.upsample_sum import upsample_sum

__all__ = ["upsample_cross_entropy"]


def upsample_cross_entropy(
    features: Sequence[Tensor],
    target: Tensor,
    bias: Tensor | None = None,
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: Sequence[int] | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """``F.cross_entropy(upsample_sum(features, target.shape[1:]), target)``."""
    logits = upsample_sum(features, target.shape[1:], bias, mode, antialias, via)
    return F.cross_entropy(
        logits,
        target.long(),
        weight=None if weight is None else weight.to(logits.dtype),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
