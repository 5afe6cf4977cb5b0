"""Attention of every token to every token of its sequence, on CPUs: inference in float32, and in bfloat16 where a
processor has matrix units for it (Intel AMX). torch's ``scaled_dot_product_attention`` does all else.

The error is about that of torch's own kernel: both round operands, weights and results, and nothing between. Its speed
is in ``benchmarks/models/dense_attention.py``: on two threads of an Intel Xeon with AMX 1.05 to 1.2 times torch's in
float32 and 1.4 to 1.7 times in bfloat16.

Memory: the result, and per thread the keys and values of a head and 150 KB.

Source: Dao et al., FlashAttention, arXiv 2205.14135.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from murf_fast import _extension, backends
from murf_fast.ops import _contract
from murf_fast.ops._derivatives import is_watched, writes_nothing
from murf_fast.ops._library import register

# Tokens of a sequence from which on it is faster than torch's kernel.
LEAST_TOKENS = 64

DTYPES = (torch.float32, torch.bfloat16)


def pays(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether :func:`dense_attention` may take the place of torch's for these, and is faster."""
    if torch.compiler.is_compiling():  # before a graph is made for some numbers of tokens
        return False
    if not q.is_cpu or q.shape[1] < LEAST_TOKENS or q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return False
    if writes_nothing((q, k, v)) or is_watched() or backends.resolve(None, "cpu", q.dtype) != "native":
        return False
    level = _extension.current_level()
    return level == "amx" or (level != "baseline" and q.dtype == torch.float32)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``softmax(scale q k^T) v`` of every sequence and head.

    q, k, v: (sequences, tokens, heads, dim), float32 or bfloat16, on the CPU. Returns the same, dense.
    """
    return _dense_attention(q, k, v, scale, "native")


def _requires(op, q, k, v, scale, backend) -> None:
    _contract.backend(op, backend, q)
    if backend != "native":
        raise ValueError(f"murf_fast.{op}: `backend` must be 'native', got {backend!r}")
    _contract.tensor(op, "q", q, q, (None,) * 4, DTYPES)
    if not all(q.shape[1:]):
        raise ValueError(f"murf_fast.{op}: `q` must have tokens, heads and channels, got {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        _contract.tensor(op, name, x, q, q.shape, (q.dtype,))
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
