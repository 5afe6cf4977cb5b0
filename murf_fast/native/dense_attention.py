"""Attention within sequences; see :mod:`murf_fast.ops._dense_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import extension, refuse, strided

__all__ = ["dense_attention"]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
    """All (sequences, tokens, heads, dim), bfloat16, channels side by side."""
    shape = tuple(q.shape)
    for x in (q, k, v, out):
        if shape[3] > 1 and x.stride(3) != 1:
            refuse(x, torch.bfloat16, "channels side by side")
    maps = {name: strided(x, torch.bfloat16, shape) for name, x in zip("qkv", (q, k, v), strict=True)}
    attention = extension.DenseAttention(shape=shape, scale=scale, out=strided(out, torch.bfloat16, shape), **maps)
    extension.dense_attention(attention=attention, threads=_fork.threads())
