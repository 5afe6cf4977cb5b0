"""AnyUp as a function of its weights, by the names of the released state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast import backends, windows
from murf_fast.annotations import Values
from murf_fast.nn.guided import _recomputed
from murf_fast.nn.guided._encoded import ImageKeys, ImageStatistics, grids_of
from murf_fast.nn.guided._encoders import pooled
from murf_fast.ops import feature_unify, window_attention
from murf_fast.ops._derivatives import derivatives_wanted
from murf_fast.ops._image_encoders import ENCODER, UNIT_EPS, flat, image_queries
from murf_fast.ops._image_regions import image_rectangle, image_statistics
from murf_fast.reference.anyup import encoder, residual_block

_ATTENTION = "cross_decode.cross_attn"
_FEATURES = "key_features_encoder"
_OF_KEYS = (_FEATURES, "aggregation", _ATTENTION)
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
    values: Tensor | None = None,
    by_head: Values = "mean",
) -> Tensor:
    """(B, C, *size) from checked arguments; differentiable, and without gradients in far less time and memory.

    Queries and keys are made in the dtype of the image, and attend in the wider of that and the values'; ``by_head`` is
    what ``window_attention`` calls ``values``.
    """
    v = features if values is None else values
    dtype = torch.promote_types(v.dtype, image.dtype)
    grid = (features.shape[2], features.shape[3])
    q, of_image = encode(weights, image, size, (0, 0, *size), [grid])
    k = keys_of(weights, of_image.maps[0], features)
    q, k = q.to(dtype), k.to(dtype)
    return window_attention(q, k, v.to(dtype), windows=rule, num_heads=num_heads, values=by_head).to(v.dtype)


def encode(
    weights: Mapping[str, Tensor],
    image: Tensor,
    size: Sequence[int],
    region: Sequence[int],
    grids: Sequence[tuple[int, int]] | None,
    known: ImageStatistics | None = None,
) -> tuple[Tensor, ImageKeys]:
    """Projected queries of the region, and the image's part of the keys; ``known`` saves the pass for it."""
    whole = tuple(region) == (0, 0, *size)
    with torch.autocast(image.device.type, enabled=False):
        network, backend = _network(weights, image)
        if backend is None:
            encoded, of_image = _plain_keys(weights, image, grids)
            q = _plain_queries(weights, encoded, size, region)
            return q, of_image if known is None else known.keys
        if whole and known is None:
            q, *maps = image_queries(image, *network, size, region, grids_of(image, grids), backend)  # type: ignore[arg-type, call-arg]
            return q, ImageKeys.of(maps, grids)
        if known is None:
            known = statistics_of(weights, image, grids)
        return image_rectangle(image, cast("Tensor", known.norms), flat(*network), size, region, backend), known.keys


def statistics_of(
    weights: Mapping[str, Tensor], image: Tensor, grids: Sequence[tuple[int, int]] | None, recompute: bool = False
) -> ImageStatistics:
    """What every region needs of the whole image."""
    with torch.autocast(image.device.type, enabled=False):
        network, backend = _network(weights, image)
        if backend is None:
            _, of_image = _plain_keys(weights, image, grids)
            return ImageStatistics("AnyUp", None, of_image, (image.shape[2], image.shape[3]))
        size = (image.shape[2], image.shape[3])
        norms, *maps = image_statistics(image, flat(*network), size, grids_of(image, grids), recompute, backend)
        return ImageStatistics("AnyUp", norms, ImageKeys.of(maps, grids), size)


def keys_of(weights: Mapping[str, Tensor], of_image: Tensor, features: Tensor) -> Tensor:
    """Projected keys on the grid of the features, in the dtype of the image's part.

    Half types are computed in float32, which few pixels make cheap: what the basis makes of features lies within a few
    millionths of a constant, of which bfloat16 keeps three digits.
    """
    with torch.autocast(features.device.type, enabled=False):
        dtype = torch.promote_types(of_image.dtype, torch.float32)
        weights = {name: w.to(dtype) for name, w in weights.items() if name.startswith(_OF_KEYS)}
        weight, bias = _projection(weights, 1)
        return _projected(_keys(weights, of_image.to(dtype), features.to(dtype)), weight, bias).to(of_image.dtype)


def wants_gradients(weights: Mapping[str, Tensor], image: Tensor) -> bool:
    """Whether anything of the image's part wants one."""
    return derivatives_wanted((image, *flat(*_parameters(weights))))


def _network(weights: Mapping[str, Tensor], image: Tensor) -> tuple[Any, str | Any]:
    """The parameters as the passes over pixels take them, and their backend; None where plain PyTorch has to do."""
    network = _parameters(weights)
    backend = backends.resolve(None, image.device.type, image.dtype)
    plain = backend == "reference" or weights["image_encoder.0.weight"].shape[2:] != (1, 1)
    return network, None if plain or wants_gradients(weights, image) else backend


def _parameters(weights: Mapping[str, Tensor]) -> Any:
    encoders = [[weights[f"{name}.{part}"] for part in ENCODER] for name in _OF_IMAGE]
    return encoders, weights["rope.freqs"], weights["cross_decode.conv2d.weight"], _projection(weights, 0)


def _projection(weights: Mapping[str, Tensor], which: int) -> tuple[Tensor, Tensor]:
    """Of queries (0) or keys (1): the norm's weights scale the columns."""
    weight, bias = (weights[f"{_ATTENTION}.attention.in_proj_{name}"].chunk(3)[which] for name in ("weight", "bias"))
    return weight * weights[f"{_ATTENTION}.norm_{'qk'[which]}.weight"], bias


def _plain_keys(weights: Any, image: Tensor, grids: Any) -> tuple[Tensor, ImageKeys]:
    """The encoded image, and the keys of it."""
    encoded = _recomputed.encoder(weights, _OF_IMAGE[0], image)
    encoded = _recomputed.mixed_with_positions(encoded, weights["rope.freqs"])
    of_keys = _recomputed.encoder(weights, _OF_IMAGE[1], encoded)
    return encoded, ImageKeys.of([pooled(of_keys, grid) for grid in grids_of(image, grids)], grids)


def _plain_queries(weights: Any, encoded: Any, size: Any, region: Any) -> Tensor:
    (height, width), (top, left, rows, columns) = size, region
    q = pooled(_recomputed.encoder(weights, _OF_IMAGE[2], encoded), size)
    # Zeros around the output, not around the rectangle.
    q = q[:, :, max(top - 1, 0) : top + rows + 1, max(left - 1, 0) : left + columns + 1]
    q = F.pad(q, (int(left == 0), int(left + columns == width), int(top == 0), int(top + rows == height)))
    return _projected(F.conv2d(q, weights["cross_decode.conv2d.weight"]), *_projection(weights, 0))


def _keys(weights: Mapping[str, Tensor], from_image: Tensor, features: Tensor) -> Tensor:
    if f"{_FEATURES}.0.basis" not in weights:
        return encoder(weights, "aggregation", from_image)
    unified = feature_unify(F.normalize(features, dim=1), weights[f"{_FEATURES}.0.basis"])
    # Averages of softmaxes lie within a few millionths of their mean, which the blocks' norms take off again: taken off
    # before, it costs no digits. The difference is exact, and blocks pass a constant on.
    mean = 1 / unified.shape[1]
    unified = residual_block(weights, f"{_FEATURES}.1", unified - mean)
    if (shortcut := weights.get(f"{_FEATURES}.1.shortcut.weight")) is None:
        unified = residual_block(weights, f"{_FEATURES}.2", unified) + mean
    else:  # which makes another constant of it for every channel, that norms of groups of channels do not take off
        unified = unified + mean * shortcut.sum((1, 2, 3))[:, None, None]
        unified = residual_block(weights, f"{_FEATURES}.2", unified)
    return encoder(weights, "aggregation", torch.cat([from_image, unified], 1))


def _projected(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1x1 convolution of pixels of unit mean square, channels_last."""
    rows = x.permute(0, 2, 3, 1).to(torch.promote_types(x.dtype, torch.float32))
    rows = rows * (rows.square().mean(-1, keepdim=True) + UNIT_EPS).rsqrt()
    return F.linear(rows.to(x.dtype), weight, bias).permute(0, 3, 1, 2)
