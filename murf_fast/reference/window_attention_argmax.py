from __future__ import annotations

import torch
from torch import Tensor

from murf_fast.reference.window_attention import window_attention
from murf_fast.windows import Windows

__all__ = ["window_attention_argmax"]


def window_attention_argmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Windows,
    num_heads: int,
    values: str = "mean",
    scale: float | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    class_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(labels, logits)`` of ``window_attention``, summed over split heads, plus the bias; labels are int64."""
    logits = window_attention(q, k, v, windows, num_heads, values, scale, bias)
    if values == "split":
        logits = logits.unflatten(1, (num_heads, -1)).sum(1)
    if class_bias is not None:
        offset = class_bias.to(torch.promote_types(class_bias.dtype, logits.dtype))
        logits = logits + offset.view(-1, logits.shape[1], 1, 1)
    return logits.argmax(1), logits
