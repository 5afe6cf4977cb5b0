from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast.reference._resize import averaged
from murf_fast.reference.feature_unify import feature_unify
from murf_fast.windows import Windows


def anyup(
    weights: Mapping[str, Tensor],
    image: Tensor,
    features: Tensor,
    windows: Windows,
    output_size: Sequence[int] | None = None,
    num_heads: int = 4,
    values: str = "mean",
) -> Tensor:
    """AnyUp as its code is written: whole maps, a dense mask, every weight of every head; (B, C, H, W).

    ``weights`` is a released state dict, ``windows`` the rule made for the output and the features' grid; with
    ``values="split"`` heads share out the channels. Weights without ``key_features_encoder``: keys of the image alone.
    """
    size = tuple(output_size or image.shape[2:])
    weights = {name: w.to(image.dtype) for name, w in weights.items()}
    encoded = mixed_with_positions(encoder(weights, "image_encoder", image), weights["rope.freqs"])
    q = averaged(encoder(weights, "query_encoder", encoded), size)
    k = averaged(encoder(weights, "key_encoder", encoded), features.shape[2:])
    if "key_features_encoder.0.basis" in weights:
        unified = feature_unify(F.normalize(features, dim=1), weights["key_features_encoder.0.basis"]).to(image.dtype)
        k = torch.cat([k, residual_blocks(weights, "key_features_encoder", unified)], 1)
    k = encoder(weights, "aggregation", k)
    q = F.conv2d(q, weights["cross_decode.conv2d.weight"], padding=1)
    return attend(weights, q, k, features, windows, num_heads, values)


def encoder(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Convolution with reflected borders, two residual blocks."""
    kernel = weights[f"{name}.0.weight"]
    padded = F.pad(x, [kernel.shape[-1] // 2] * 4, mode="reflect") if kernel.shape[-1] > 1 else x
    return residual_blocks(weights, name, F.conv2d(padded, kernel))


def residual_blocks(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    for block in (f"{name}.1", f"{name}.2"):
        x = residual_block(weights, block, x)
    return x


def residual_block(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A block that changes the number of channels has a 1x1 convolution beside it."""
    y, block, shortcut = x, f"{name}.block", weights.get(f"{name}.shortcut.weight")
    for norm, convolution in ((0, 2), (3, 5)):
        y = F.group_norm(y, 8, weights[f"{block}.{norm}.weight"], weights[f"{block}.{norm}.bias"])
        y = F.conv2d(F.silu(y), weights[f"{block}.{convolution}.weight"])
    return (x if shortcut is None else F.conv2d(x, shortcut)) + y


def mixed_with_positions(x: Tensor, frequencies: Tensor) -> Tensor:
    """``x cos(a) + turned(x) sin(a)``, a linear in the position: with learned frequencies, not a rotation."""
    rows, columns = (torch.linspace(0, 1, n, dtype=x.dtype, device=x.device) for n in x.shape[2:])
    of_row, of_column = frequencies[:, :, None]
    angle = (of_row * rows)[:, :, None] + (of_column * columns)[:, None]
    first, second = x.chunk(2, 1)
    return x * angle.cos() + torch.cat([-second, first], 1) * angle.sin()


def unit_rms(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of the last dimension, with the eps of float32 in every type, in float32 at least."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y * (y.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt() * weight
    return y.to(x.dtype)


def attend(
    weights: Mapping[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Windows,
    num_heads: int,
    values: str = "mean",
) -> Tensor:
    size, block = q.shape[2:], "cross_decode.cross_attn"
    q = unit_rms(q.flatten(2).mT, weights[f"{block}.norm_q.weight"])
    k = unit_rms(k.flatten(2).mT, weights[f"{block}.norm_k.weight"])
    rows, columns = (torch.from_numpy(t.multiplicity()).to(q).log() for t in windows.tables(size, v.shape[2:]))
    mask = (rows[:, None, :, None] + columns[None, :, None, :]).flatten(0, 1).flatten(1)
    # The values and the output projection of this module have no influence; only its weights are used.
    _, attention = F.multi_head_attention_forward(
        q.transpose(0, 1),
        k.transpose(0, 1),
        k.transpose(0, 1),
        q.shape[2],
        num_heads,
        weights[f"{block}.attention.in_proj_weight"],
        weights[f"{block}.attention.in_proj_bias"],
        None,
        None,
        False,
        0.0,
        weights[f"{block}.attention.out_proj.weight"],
        weights[f"{block}.attention.out_proj.bias"],
        need_weights=True,
        attn_mask=mask,
        average_attn_weights=values == "mean",
    )
    if values == "split":
        v = v.flatten(2).unflatten(1, (num_heads, -1))
        return torch.einsum("bnqk,bnck->bncq", attention, v).flatten(1, 2).unflatten(2, size)
    return torch.einsum("bqk,bkc->bqc", attention, v.flatten(2).mT).mT.unflatten(2, size)
