from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from murf_fast import windows
from murf_fast.reference.window_attention import window_attention

__all__ = ["neighborhood_attention"]


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
    scale: float | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Window attention of a grid to itself, under NATTEN's rule; maps (B, H, W, heads, dim), biases as tables."""
    grid, heads = tuple(q.shape[1:3]), q.shape[3]
    rule = windows.neighborhood(grid, grid, tuple(kernel_size), stride=tuple(stride), dilation=tuple(dilation))
    q, k, v = (x.flatten(3).permute(0, 3, 1, 2) for x in (q, k, v))
    out = window_attention(q, k, v, rule, heads, "split", scale, bias)
    return out.permute(0, 2, 3, 1).unflatten(3, (heads, -1))
