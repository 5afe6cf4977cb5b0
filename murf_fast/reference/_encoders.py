from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

GROUPS = 8


def guided_encoder(weights: Mapping[str, Tensor], name: str, x: Tensor, *, residual: bool) -> Tensor:
    """NAF's and JAFAR's: a convolution, blocks of twice group norm, SiLU and convolution; borders are reflected."""

    def convolved(layer: str, x: Tensor) -> Tensor:
        weight = weights[f"{name}.{layer}.weight"]
        border = weight.shape[-1] // 2
        padded = F.pad(x, [border] * 4, mode="reflect") if border else x
        return F.conv2d(padded, weight, weights.get(f"{name}.{layer}.bias"))

    def activated(layer: str, x: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, GROUPS, weights[f"{name}.{layer}.weight"], weights[f"{name}.{layer}.bias"]))

    x, block = convolved("0", x), 1
    while f"{name}.{block}.conv1.weight" in weights:
        y = x
        for i in (1, 2):
            y = convolved(f"{block}.conv{i}", activated(f"{block}.norm{i}", y))
        x, block = x + y if residual else y, block + 1
    return x
