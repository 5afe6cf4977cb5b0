"""Tokens that attend to their neighbours."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from inputs import coordinates, randn
from registry import Contenders, Target, case, configurations, side, smallest
from tiny import attention, backward
from torch import Tensor

import murf_fast


@case(
    "neighborhood_attention",
    "64^2 tokens, 16 heads of 64, window 7",
    # What NATTEN's CPU path would be if it compiled there: it is FlexAttention with a mask of its own.
    targets=(Target("FlexAttention compile", 2.0),),
)
def neighborhood(device, dtype):
    n, heads, dim, kernel = max(side(64), 8), 16, 64, 7
    q, k, v = (randn(device, dtype, 1, n, n, heads, dim) * s for s in (1.0, 0.9, 1.1))
    rule = murf_fast.windows.neighborhood(n, n, kernel)
    rows, columns = (torch.from_numpy(axis.multiplicity() > 0).to(device) for axis in rule.tables())
    tokens = [x.flatten(1, 2).transpose(1, 2).contiguous() for x in (q, k, v)]
    mask = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(1, 1, n * n, n * n)

    def grid(out: Tensor) -> Tensor:
        return out.transpose(1, 2).unflatten(1, (n, n))

    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    y_of, x_of = coordinates(n, device)

    def attends(b, h, q_index, k_index):
        return rows[y_of[q_index], y_of[k_index]] & columns[x_of[q_index], x_of[k_index]]

    block_mask = create_block_mask(attends, None, None, n * n, n * n, device=device)
    graph = torch.compile(flex_attention, dynamic=False)
    others = {
        "FlexAttention compile": lambda: grid(graph(*tokens, block_mask=block_mask)),
        "dense SDPA": lambda: grid(F.scaled_dot_product_attention(*tokens, attn_mask=mask)),
    }
    if importlib.util.find_spec("natten") is not None:
        from natten import na2d

        others["NATTEN"] = lambda: na2d(q, k, v, kernel_size=kernel)

    def oracle():
        doubles = [x.double() for x in (q, k, v)]
        yield (), murf_fast.reference.neighborhood_attention(*doubles, (kernel, kernel))

    return Contenders(
        lambda: murf_fast.neighborhood_attention(q, k, v, kernel_size=kernel),
        others,
        oracle,
        q.numel() * q.element_size(),
        operations=4 * q.numel() * kernel**2,
    )


@smallest("neighborhood_attention")
def tiny(device: str) -> None:
    def tokens(x):
        return x.unflatten(1, (2, -1)).permute(0, 3, 4, 1, 2)

    attention(device, lambda *x: murf_fast.neighborhood_attention(*map(tokens, x), kernel_size=3), (3, 4))


@configurations("neighborhood_attention")
def shapes(device: str, dtype: torch.dtype) -> None:
    """Blocks of 16 queries, with few channels."""
    q, k, v = (torch.zeros(1, 12, 12, 2, d, device=device, dtype=dtype, requires_grad=True) for d in (16, 16, 16))
    slopes = tuple(torch.zeros(2, device=device, requires_grad=True) for _ in range(2))
    for bias in (None, slopes):
        backward(murf_fast.neighborhood_attention(q, k, v, kernel_size=3, bias=bias))
