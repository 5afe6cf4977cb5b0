"""Attention of queries on any grid to windows of keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import address, dtype_tag, extension, prefer_huge_pages, strided, wanted
from murf_fast.tables.query_blocks import blocks_of, forward_blocks_of

__all__ = ["window_attention", "window_attention_backward"]


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_y: Tensor | None,
    bias_x: Tensor | None,
    rule: tuple[str, str],
    heads: int,
    mean: bool,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Queries (B, heads D, H, W), keys (B, heads D, h, w), values (B, V, h, w); ``out`` (B, V, H, W) of any strides:
    values averaged over the heads (``mean``) or split between them. Biases (heads, H, h) and (heads, W, w) float32;
    ``lse`` (B, heads, H, W) float32.
    """
    prefer_huge_pages(out)
    grid = tuple(q.shape[2:])
    extension.window_attention(
        dtype=dtype_tag(q.dtype),
        attention=attention_of(forward_blocks_of, q, k, v, bias_y, bias_x, rule, heads, mean, scale),
        out=strided(out, q.dtype, (len(q), v.shape[1], *grid)),
        lse=address(lse, torch.float32, len(q) * heads * grid[0] * grid[1]),
        threads=_fork.threads(),
    )


def window_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_y: Tensor | None,
    bias_x: Tensor | None,
    rule: tuple[str, str],
    heads: int,
    mean: bool,
    scale: float,
    shares: int,
    results: list[Tensor],
) -> None:
    """``results``: gradients of q, k, v and the biases; an empty one is not wanted. Bias gradients come for both,
    summed here from parts (B * shares, heads, H, h) float32.
    """
    parts = []
    biases: Sequence[Any] = (bias_y, bias_x)
    for bias, result in zip(biases, results[3:], strict=True):
        parts.append(q.new_empty((q.shape[0] * shares, *bias.shape), dtype=torch.float32) if result.numel() else None)
    grid = tuple(q.shape[2:])
    extension.window_attention_backward(
        dtype=dtype_tag(q.dtype),
        attention=attention_of(blocks_of, q, k, v, bias_y, bias_x, rule, heads, mean, scale),
        gradients=extension.WindowGradients(
            grad_out=strided(grad_out, q.dtype, (len(q), v.shape[1], *grid)),
            grad_lse=address(grad_lse, torch.float32, len(q) * heads * grid[0] * grid[1]),
            q=wanted(results[0], q),
            k=wanted(results[1], k),
            v=wanted(results[2], v),
            bias_y=address(parts[0], torch.float32, 0),
            bias_x=address(parts[1], torch.float32, 0),
            shares=shares,
        ),
        threads=_fork.threads(),
    )
    for part, result in zip(parts, results[3:], strict=True):
        if part is not None:
            result.copy_(part.sum(0))


def attention_of(
    blocks: Any, q: Tensor, k: Tensor, v: Tensor, bias_y: Any, bias_x: Any, rule: Any, heads: Any, mean: Any, scale: Any
) -> Any:
    (batch, depth, *grid), (*_, height, width), single = q.shape, k.shape, torch.float32
    rows, columns = blocks(*rule, tuple(grid), (height, width))
    return extension.WindowAttention(
        batch=batch,
        heads=heads,
        head_dim=depth // heads,
        channels=v.shape[1],
        mean=mean,
        scale=scale,
        q=strided(q, q.dtype, (batch, depth, rows.out_size, columns.out_size)),
        k=strided(k, q.dtype, (batch, depth, rows.in_size, columns.in_size)),
        v=strided(v, q.dtype, (batch, v.shape[1], rows.in_size, columns.in_size)),
        y=rows.native,
        x=columns.native,
        bias_y=address(bias_y, single, heads * grid[0] * height),
        bias_x=address(bias_x, single, heads * grid[1] * width),
    )
