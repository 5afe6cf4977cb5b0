from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from murf_fast.annotations import Mode
from murf_fast.reference.upsample_argmax import upsample_argmax

__all__ = ["upsample_confusion"]


def upsample_confusion(
    features: Sequence[Tensor],
    target: Tensor,
    bias: Tensor | None = None,
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: Sequence[int] | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """``bincount(K target + labels)`` as a matrix (K, K), over the pixels that count."""
    classes = features[0].shape[1]
    labels, _ = upsample_argmax(features, tuple(target.shape[1:]), bias, mode, antialias, via)
    counts = target != ignore_index
    pairs = classes * target[counts].long() + labels[counts]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)
