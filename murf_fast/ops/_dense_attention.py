"""Attention of every token to every token of its sequence, in bfloat16 on CPUs with matrix units for it (Intel AMX).

Inference only, and only there is it faster than torch's ``scaled_dot_product_attention``, which does all else. The
error is that of torch's own kernel: both round operands, weights and results, and nothing between.

Memory: the result, and per thread the keys and values of a head and 130 KB.

Source: Dao et al., FlashAttention, arXiv 2205.14135.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from murf_fast import backends
from murf_fast.ops import _contract
from murf_fast.ops._derivatives import writes_nothing
from murf_fast.ops._library import register
from murf_fast.ops._pixels import arithmetic_of

# Tokens of a sequence from which on it is faster than torch's kernel.
LEAST_TOKENS = 128


def pays(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether :func:`dense_attention` may take the place of torch's for these, and is faster."""
    if not q.is_cpu or q.shape[1] < LEAST_TOKENS or any(t.dtype != torch.bfloat16 for t in (q, k, v)):
        return False
    if writes_nothing((q, k, v)) or backends.resolve(None, "cpu", q.dtype) != "native":
        return False
    return arithmetic_of("native", q.dtype) == q.dtype


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``softmax(scale q k^T) v`` of every sequence and head.

    q, k, v: (sequences, tokens, heads, dim), bfloat16, on the CPU. Returns the same, dense.
    """
    return _dense_attention(q, k, v, scale, "native")


def _requires(op, q, k, v, scale, backend) -> None:
    _contract.backend(op, backend, q)
    if backend != "native":
        raise ValueError(f"murf_fast.{op}: `backend` must be 'native', got {backend!r}")
    _contract.tensor(op, "q", q, q, (None,) * 4, (torch.bfloat16,))
    if not all(q.shape[1:]):
        raise ValueError(f"murf_fast.{op}: `q` must have tokens, heads and channels, got {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        _contract.tensor(op, name, x, q, q.shape, (torch.bfloat16,))
    if not math.isfinite(scale):
        raise ValueError(f"murf_fast.{op}: `scale` must be finite, got {scale}")


def _empty(q, k, v, scale, backend) -> Tensor:
    return q.new_empty(q.shape)


def _launch(q, k, v, scale, backend, result) -> None:
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    backends.launcher(backend).dense_attention(q, k, v, scale, result)


_dense_attention = register(
    "dense_attention(Tensor q, Tensor k, Tensor v, float scale, str backend) -> Tensor", _requires, _empty, _launch
)
