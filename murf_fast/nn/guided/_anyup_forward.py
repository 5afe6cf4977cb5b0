"""AnyUp as a function of its weights, by the names of the released state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast import backends, windows
from murf_fast.ops import feature_unify, window_attention
from murf_fast.ops._derivatives import derivatives_wanted
from murf_fast.ops._image_encoders import ENCODER, UNIT_EPS, image_queries
from murf_fast.reference.anyup import encoder, mixed_with_positions, residual_blocks

_ATTENTION = "cross_decode.cross_attn"
_OF_IMAGE = ("image_encoder", "key_encoder", "query_encoder")
WINDOWS = ("dense", "natten")


def window_rule(name: str, ratio: float, size: Sequence[int], grid: Sequence[int]) -> windows.Windows:
    """The windows of AnyUp's attention (``"dense"``), or those it has with ``use_natten=True`` (``"natten"``)."""
    size, grid = tuple(size), tuple(grid)
    if name == "dense":
        return windows.ratio(size, grid, ratio)
    return windows.neighborhood(size, grid, tuple(_neighbors(n, ratio) for n in grid))


def _neighbors(n: int, ratio: float) -> int:
    if ratio <= 0 or ratio >= 0.5:
        return n
    count = max(3, round(2 * ratio * n))
    return count + (count + 1) % 2


def upsample(
    weights: Mapping[str, Tensor],
    image: Tensor,
    features: Tensor,
    size: Sequence[int],
    rule: windows.Windows,
    num_heads: int,
) -> Tensor:
    """(B, C, *size) from checked arguments; differentiable, and without gradients in far less time and memory.

    Queries and keys are made in the dtype of the image, and attend in the wider of that and the features'.
    """
    given, dtype = features.dtype, torch.promote_types(features.dtype, image.dtype)
    with torch.autocast(image.device.type, enabled=False):
        q, k = _queries_and_keys(weights, image, features.to(image.dtype), size)
        result = window_attention(q.to(dtype), k.to(dtype), features.to(dtype), windows=rule, num_heads=num_heads)
        return result.to(given)


def _queries_and_keys(weights, image, features, size) -> tuple[Tensor, Tensor]:
    """Projected; the queries at ``size``, the keys on the grid of the features."""
    grid = features.shape[2:]
    weight, bias = (weights[f"{_ATTENTION}.attention.in_proj_{name}"].chunk(3)[:2] for name in ("weight", "bias"))
    # The weights of the norms scale the columns of the projections.
    of_q, of_k = (w * weights[f"{_ATTENTION}.norm_{name}.weight"] for w, name in zip(weight, "qk", strict=True))
    convolution = weights["cross_decode.conv2d.weight"]
    encoders = [[weights[f"{name}.{part}"] for part in ENCODER] for name in _OF_IMAGE]
    frequencies = weights["rope.freqs"]
    parameters = [*(w for e in encoders for w in e), frequencies, convolution, of_q, bias[0]]
    backend = backends.resolve(None, image.device.type, image.dtype)
    if derivatives_wanted((image, *parameters)) or backend == "reference" or encoders[0][0].shape[2:] != (1, 1):
        encoded = mixed_with_positions(encoder(weights, _OF_IMAGE[0], image), frequencies)
        k = F.adaptive_avg_pool2d(encoder(weights, _OF_IMAGE[1], encoded), grid)
        q = F.adaptive_avg_pool2d(encoder(weights, _OF_IMAGE[2], encoded), tuple(size))
        q = _projected(F.conv2d(q, convolution, padding=1), of_q, bias[0])
    else:
        projection = (of_q, bias[0])
        q, k = image_queries(image, encoders, frequencies, convolution, projection, size, grid, backend)
    return q, _projected(_keys(weights, k, features), of_k, bias[1])


def _keys(weights: Mapping[str, Tensor], from_image: Tensor, features: Tensor) -> Tensor:
    unified = feature_unify(F.normalize(features, dim=1), weights["key_features_encoder.0.basis"])
    # Averages of softmaxes lie within a few millionths of their mean, which the blocks' norms take off again: taken off
    # before, it costs no digits. The difference is exact, and blocks pass a constant on.
    mean = 1 / unified.shape[1]
    unified = residual_blocks(weights, "key_features_encoder", unified - mean) + mean
    return encoder(weights, "aggregation", torch.cat([from_image, unified], 1))


def _projected(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1x1 convolution of pixels of unit mean square, channels_last."""
    rows = x.permute(0, 2, 3, 1).to(torch.promote_types(x.dtype, torch.float32))
    rows = rows * (rows.square().mean(-1, keepdim=True) + UNIT_EPS).rsqrt()
    return F.linear(rows.to(x.dtype), weight, bias).permute(0, 3, 1, 2)
