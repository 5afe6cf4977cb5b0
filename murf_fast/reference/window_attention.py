from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from murf_fast.windows import Windows

__all__ = ["window_attention"]


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Windows,
    num_heads: int,
    values: str = "mean",
    scale: float | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    return_lse: bool = False,
) -> Tensor | Any:
    """Row after row of queries: products with the keys of the rows' windows, softmax over them, weighted values."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    (height, width), (h, w) = q.shape[2:], k.shape[2:]
    rows, columns = windows.tables((height, width), (h, w))
    counts = torch.from_numpy(columns.multiplicity()).to(q.device, dtype).log()
    q, k, v = q.to(dtype).unflatten(1, (num_heads, -1)), k.to(dtype).unflatten(1, (num_heads, -1)), v.to(dtype)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    by_row: Any
    by_column: Any
    by_row, by_column = (None, None) if bias is None else (b.to(dtype) for b in bias)
    out, lse = [], []
    for y in range(height):
        read = torch.from_numpy(rows.index[y, : rows.count[y]]).long().to(q.device)
        scores = torch.einsum("bndx,bndyw->bnxyw", q[:, :, :, y], k[:, :, :, read]) * scale
        if bias is not None:
            scores = scores + by_row[:, y, read][:, None, :, None] + by_column[:, :, None]
        scores = (scores + counts[:, None]).flatten(3)
        weights = scores.softmax(-1).unflatten(3, (len(read), w))
        if values == "mean":
            out.append(torch.einsum("bxyw,bcyw->bcx", weights.mean(1), v[:, :, read]))
        else:
            own = v[:, :, read].unflatten(1, (num_heads, -1))
            out.append(torch.einsum("bnxyw,bncyw->bncx", weights, own).flatten(1, 2))
        lse.append(scores.logsumexp(-1))
    result = torch.stack(out, 2)
    return (result, torch.stack(lse, 2)) if return_lse else result
