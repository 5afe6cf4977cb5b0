"""Tokens of a ViT's embedding layer for one resolution."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["patch_embed"]


def patch_embed(
    patches: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor | None, prefix: Tensor | None
) -> Tensor:
    """(B, N, K) patches -> (B, P + N, D): the projection, then the P prefix tokens before it, then positions."""
    tokens = patches @ weight.mT
    if bias is not None:
        tokens = tokens + bias
    if prefix is not None:
        tokens = torch.cat([prefix.expand(len(tokens), -1, -1), tokens], dim=1)
    return tokens if positions is None else tokens + positions
