from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast.reference._encoders import GROUPS, guided_encoder
from murf_fast.reference._resize import averaged
from murf_fast.reference.anyup import mixed_with_positions, unit_rms


def jafar(
    weights: Mapping[str, Tensor],
    image: Tensor,
    features: Tensor,
    output_size: Sequence[int] | None = None,
    num_heads: int = 4,
) -> Tensor:
    """JAFAR as its code is written: whole maps, every weight of every head; (B, C, H, W)."""
    size = tuple(output_size or image.shape[2:])
    q, k = jafar_queries_and_keys(weights, image, features, size)
    return attend(q, k, features, num_heads).unflatten(2, size)


def jafar_queries_and_keys(
    weights: Mapping[str, Tensor], image: Tensor, features: Tensor, size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Projected queries (B, H * W, D) and keys (B, h * w, D)."""
    encoded = guided_encoder(weights, "image_encoder", image, residual=True)
    encoded = mixed_with_positions(encoded, weights["rope.freqs"])
    q = averaged(guided_encoder(weights, "query_encoder", encoded, residual=True), size)
    k = averaged(guided_encoder(weights, "key_encoder", encoded, residual=True), features.shape[2:])
    known = guided_encoder(weights, "key_features_encoder", F.normalize(features, dim=1), residual=True)
    gamma, beta = (F.conv2d(known, weights[f"sft_key.{name}.weight"]) for name in ("gamma", "beta"))
    q = F.conv2d(F.group_norm(q, GROUPS), weights["cross_decode.conv2d.weight"], padding=1)
    k = gamma * F.group_norm(k, GROUPS) + beta
    block, projected = "cross_decode.cross_attn", []
    biases = weights[f"{block}.attention.in_proj_bias"].chunk(3)
    for name, x, bias in zip("qk", (q, k), biases, strict=False):
        x = unit_rms(x.flatten(2).mT, weights[f"{block}.norm_{name}.weight"])
        projected.append(F.linear(x, weights[f"{block}.attention.{name}_proj_weight"], bias))
    return projected[0], projected[1]


def attend(q: Tensor, k: Tensor, features: Tensor, num_heads: int) -> Tensor:
    """Means over the heads of all features (B, C, queries)."""
    q, k = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (q, k))
    attention = (q @ k.mT * q.shape[3] ** -0.5).softmax(-1).mean(1)
    return torch.einsum("bqk,bkc->bcq", attention, features.flatten(2).mT)
