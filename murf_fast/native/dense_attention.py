"""Attention within sequences; see :mod:`murf_fast.ops._dense_attention`."""

from __future__ import annotations

from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import dtype_tag, extension, refuse, strided

__all__ = ["dense_attention"]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
    """All (sequences, tokens, heads, dim), float32 or bfloat16, channels side by side."""
    shape, dtype = tuple(q.shape), q.dtype
    for x in (q, k, v, out):
        if shape[3] > 1 and x.stride(3) != 1:
            refuse(x, dtype, "channels side by side")
    maps = {name: strided(x, dtype, shape) for name, x in zip("qkv", (q, k, v), strict=True)}
    attention = extension.DenseAttention(shape=shape, scale=scale, out=strided(out, dtype, shape), **maps)
    extension.dense_attention(dtype=dtype_tag(dtype), attention=attention, threads=_fork.threads())
