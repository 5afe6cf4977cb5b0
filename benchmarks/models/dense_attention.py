"""Attention within the sequences of an encoder on a CPU: q, k and v as a fused projection gives them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from inputs import randn
from registry import Contenders, Target, case, side

from murf_fast.ops._dense_attention import dense_attention

DIM = 64


def tokens(heads: int, count: int):
    """A case's builder: one sequence, DINOv2's heads of 64 channels."""

    def build(device: str, dtype: torch.dtype) -> Contenders:
        n = side(count)
        q, k, v = randn(device, dtype, 1, n, 3, heads, DIM).unbind(2)

        def plain(q, k, v):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        def oracle():
            yield (), plain(q.double(), k.double(), v.double())

        return Contenders(
            lambda: dense_attention(q, k, v, DIM**-0.5),
            {"SDPA": lambda: plain(q, k, v)},
            oracle,
            q.numel() * q.element_size(),
            operations=4 * heads * n * n * DIM,
        )

    return build


# ViT-S at 259, 518 and 777 pixels.
for _count in (325, 1370, 3026):
    for _dtype in (torch.float32, torch.bfloat16):
        _name = f"6 heads of 64, {_count} tokens, {str(_dtype).removeprefix('torch.')}"
        case("dense_attention", _name, dtype=_dtype, targets=(Target("SDPA", 1.0),), devices=("cpu",))(
            tokens(6, _count)
        )
