"""Attention of queries on any grid to windows of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast._extension import module
from murf_fast.native._address import address, dtype_tag, prefer_huge_pages, strided, wanted
from murf_fast.tables.query_blocks import blocks_of

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
    attention = _attention(q, k, v, bias_y, bias_x, rule, heads, mean, scale)
    grid = tuple(q.shape[2:])
    module().window_attention(
        dtype_tag(q),
        attention,
        strided(out, q.dtype, (len(q), v.shape[1], *grid)),
        address(lse, torch.float32, len(q) * heads * grid[0] * grid[1]),
        _fork.threads(),
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
    for bias, result in zip((bias_y, bias_x), results[3:], strict=True):
        parts.append(q.new_empty((q.shape[0] * shares, *bias.shape), dtype=torch.float32) if result.numel() else None)
    grid = tuple(q.shape[2:])
    module().window_attention_backward(
        dtype_tag(q),
        _attention(q, k, v, bias_y, bias_x, rule, heads, mean, scale),
        strided(grad_out, q.dtype, (len(q), v.shape[1], *grid)),
        address(grad_lse, torch.float32, len(q) * heads * grid[0] * grid[1]),
        tuple(wanted(result, x) for result, x in zip(results, (q, k, v))),  # noqa: B905 (biases follow)
        tuple(address(p, torch.float32, 0) for p in parts),
        shares,
        _fork.threads(),
    )
    for part, result in zip(parts, results[3:], strict=True):
        if part is not None:
            result.copy_(part.sum(0))


def _attention(q, k, v, bias_y, bias_x, rule, heads, mean, scale) -> tuple:
    (batch, depth, *grid), (*_, height, width), single = q.shape, k.shape, torch.float32
    rows, columns = blocks_of(*rule, tuple(grid), (height, width))
    return (
        (batch, heads, depth // heads, v.shape[1]),
        mean,
        scale,
        strided(q, q.dtype, (batch, depth, rows.out_size, columns.out_size)),
        strided(k, q.dtype, (batch, depth, rows.in_size, columns.in_size)),
        strided(v, q.dtype, (batch, v.shape[1], rows.in_size, columns.in_size)),
        rows.native,
        columns.native,
        address(bias_y, single, heads * grid[0] * height),
        address(bias_x, single, heads * grid[1] * width),
    )
