from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast.reference._resize import averaged
from murf_fast.reference.joint_bilateral_upsample import joint_bilateral_upsample

_RANGE = ("range_temp", "sigma_spatial", "range_proj.0.weight", "range_proj.0.bias", "range_proj.2.weight",
          "range_proj.2.bias")  # fmt: skip


def views(images: Tensor, levels: Sequence[Sequence[int]], size: Sequence[int]) -> Tensor:
    """Tiles (rows, columns) of every level, of ``size`` each; level by level, tile by tile, then the images."""
    found = []
    for rows, columns in levels:
        height, width = size
        whole = F.interpolate(images, (rows * height, columns * width), mode="bilinear", align_corners=False)
        for i in range(rows):
            for j in range(columns):
                found.append(whole[:, :, i * height : (i + 1) * height, j * width : (j + 1) * width])
    return torch.cat(found)


def mosaic(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """(B, C, rows h, columns w) from (rows columns B, C, h, w)."""
    parts = tiles.chunk(rows * columns)
    return torch.cat([torch.cat(parts[i * columns : (i + 1) * columns], 3) for i in range(rows)], 2)


def phis(covariance: Tensor, hadamard: Tensor) -> Tensor:
    """The matrix ``alpha R`` of PHI-S, ``x' = alpha R (x - mean)``, from a normalized Hadamard matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.clamp(min=0).mean() ** -0.5 * hadamard @ vectors.mT


def featsharp_attention(weights: Mapping[str, Tensor], x: Tensor, num_heads: int, window: int) -> Tensor:
    """Tokens (B, H, W, G) among all tokens, with a dense mask; (B, H, W, G)."""
    height, width, dim = x.shape[1:]
    d = dim // num_heads
    qkv = F.linear(x.flatten(1, 2), weights["qkv.weight"]).unflatten(2, (3, num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    rows, columns = (torch.arange(n, dtype=x.dtype, device=x.device) for n in (height, width))
    rows, columns = rows[:, None].expand(height, width).flatten(), columns.expand(height, width).flatten()
    apart = torch.stack([(c[:, None] - c).abs() for c in (rows, columns)])
    bias = torch.stack([-(2.0 ** -(1 + head // 2)) * apart[head % 2] for head in range(num_heads)])
    bias = bias.masked_fill((apart > window // 2).any(0), -torch.inf)
    heads = ((q @ k.mT * d**-0.5 + bias).softmax(-1) @ v)[..., :d]
    joined = heads.transpose(1, 2).flatten(2).unflatten(1, (height, width))
    return F.linear(joined, weights["proj.weight"], weights["proj.bias"])


def featsharp_block(weights: Mapping[str, Tensor], x: Tensor, num_heads: int = 16, window: int = 7) -> Tensor:
    """(B, C, H, W) from (B, G, H, W)."""
    x = x.permute(0, 2, 3, 1)
    channels = len(weights["ls2.gamma"])
    y = _norm(weights, "norm1", x)
    x = x + weights["ls1.gamma"] * featsharp_attention(_under(weights, "attn."), y, num_heads, window)
    first, second = F.linear(_norm(weights, "norm2", x), weights["mlp.w12.weight"], weights["mlp.w12.bias"]).chunk(
        2, -1
    )
    mlp = F.linear(F.silu(first) * second, weights["mlp.w3.weight"], weights["mlp.w3.bias"])
    return (x[..., :channels] + weights["ls2.gamma"] * mlp).permute(0, 3, 1, 2)


def conditional_bias(weights: Mapping[str, Tensor], x: Tensor, num_heads: int) -> Tensor:
    """A plain transformer block on the tokens of (B, C, H, W), every one of which attends to all."""
    tokens = x.flatten(2).mT
    qkv = F.linear(_norm(weights, "norm1", tokens), weights["attn.qkv.weight"]).unflatten(2, (3, num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    heads = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    attended = F.linear(heads.transpose(1, 2).flatten(2), weights["attn.proj.weight"], weights["attn.proj.bias"])
    tokens = tokens + weights["ls1.gamma"] * attended
    hidden = F.gelu(F.linear(_norm(weights, "norm2", tokens), weights["mlp.fc1.weight"], weights["mlp.fc1.bias"]))
    tokens = tokens + weights["ls2.gamma"] * F.linear(hidden, weights["mlp.fc2.weight"], weights["mlp.fc2.bias"])
    return tokens.mT.unflatten(2, x.shape[2:])


def featsharp_level(
    weights: Mapping[str, Tensor],
    low: Tensor,
    images: Tensor,
    tiles: Tensor,
    inputs: Sequence[str],
    factors: Sequence[Sequence[int]],
    num_heads: int = 16,
    window: int = 7,
) -> Tensor:
    """The inputs at the finer grid, one behind the other, and the block. ``factors``: those of the bilateral levels."""
    size = list(low.shape[2:])
    for factor in factors:
        size = [n * f for n, f in zip(size, factor, strict=True)]
    maps = []
    for name in inputs:
        if name == "bilinear":
            maps.append(F.interpolate(low, size, mode="bilinear", align_corners=False))
        elif name == "jbu":
            guidance = F.interpolate(images, size, mode="bilinear", align_corners=False)
            maps.append(_bilateral(weights, low, guidance, factors))
        else:
            positions = weights["tile_pos"]
            for axis in (2, 3):
                positions = positions.repeat_interleave(size[axis - 2] // positions.shape[axis], axis)
            maps.append(tiles + positions)
    return featsharp_block(_under(weights, "block."), torch.cat(maps, 1), num_heads, window)


def _bilateral(
    weights: Mapping[str, Tensor], source: Tensor, guidance: Tensor, factors: Sequence[Sequence[int]]
) -> Tensor:
    for i, factor in enumerate(factors):
        size = [n * f for n, f in zip(source.shape[2:], factor, strict=True)]
        params = [weights[f"jbu.ups.{i}.{name}"] for name in _RANGE]
        source = joint_bilateral_upsample(source, averaged(guidance, size), params, 3, "bilinear")
    return source


def _norm(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    if f"{name}.weight" not in weights:
        return x
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def _under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
