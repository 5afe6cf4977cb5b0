from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from murf_fast.annotations import Mode
from murf_fast.reference.upsample_sum import upsample_sum

__all__ = ["distribution", "upsample_expectation"]


def upsample_expectation(
    features: Sequence[Tensor],
    size: Sequence[int],
    values: Tensor,
    bias: Tensor | None = None,
    norm: str = "softmax",
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: Sequence[int] | None = None,
) -> Tensor:
    """``sum_k p_k values_k`` with p the softmax, or the normalized ``relu + 0.1``, of ``upsample_sum(...)``."""
    logits = upsample_sum(features, size, bias, mode, antialias, via)
    return (distribution(logits, norm) * values.reshape(1, -1, 1, 1)).sum(dim=1)


def distribution(logits: Tensor, norm: str = "softmax") -> Tensor:
    """The softmax over channels, or ``relu + 0.1`` divided by its sum."""
    if norm == "softmax":
        return logits.softmax(dim=1)
    floored = torch.relu(logits) + 0.1
    return floored / floored.sum(dim=1, keepdim=True)
