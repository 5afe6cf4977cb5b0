"""A gated MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast.ops._derivatives import writes_nothing


class SwiGLU(nn.Module):
    """``W3 (silu(h1) h2) + b3`` with ``h1, h2 = W12 x + b12``; G inputs, a hidden layer, C outputs.

    Source: xformers' packed ``SwiGLU``, whose names the weights have.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(inputs, 2 * hidden)
        self.w3 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.w12(x).chunk(2, -1)
        gate = F.silu(first)
        return self.w3(gate * second if writes_nothing([gate, second]) else gate.mul_(second))


def hidden_width(inputs: int) -> int:
    """Two thirds of four times as many, up to a multiple of 8."""
    return (int(4 * inputs * 2 / 3) + 7) // 8 * 8
