"""A gated MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast.nn._parts import is_plain
from murf_fast.nn._signatures import has_global_hooks
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
        if writes_nothing([first, second]):
            return self.w3(F.silu(first) * second)
        # What a plain layer has made is nobody else's, and is overwritten: the hidden layer is there once.
        is_ours = is_plain(self.w12, nn.Linear) and not has_global_hooks()
        return self.w3(F.silu(first, inplace=is_ours).mul_(second))

    if TYPE_CHECKING:
        __call__ = forward


def hidden_width(inputs: int) -> int:
    """Two thirds of four times as many, up to a multiple of 8."""
    return (int(4 * inputs * 2 / 3) + 7) // 8 * 8
