"""Feature maps as colours: three principal components to red, green and blue."""

from __future__ import annotations

import torch
from torch import Tensor

import murf_fast
from murf_fast.cli.demo import jbu
from murf_fast.nn.vit.principal import principal_axes


def single_projection(feature: Tensor, grid: tuple[int, int], like: Tensor) -> Tensor:
    """First three components of one map, shown on ``grid``: (3, H, W).

    Sign and order of components are arbitrary: those of ``like`` (3, H, W) with the largest correlation are taken.
    """
    mean, axes = principal_axes(feature)
    projected = torch.einsum("bchw,ck->bkhw", feature - mean.reshape(1, -1, 1, 1), axes)
    return _matched(murf_fast.resize(projected, grid)[0], like)


def upsampled_projection(feature: Tensor, image: Tensor, grid: tuple[int, int], like: Tensor) -> Tensor:
    """As :func:`single_projection`, but sixteen times as fine along the image's edges: FeatUp's upsampler.

    It is linear and treats channels alike: three components take its way instead of all channels.
    """
    mean, axes = principal_axes(feature)
    projected = torch.einsum("bchw,ck->bkhw", feature - mean.reshape(1, -1, 1, 1), axes)
    return _matched(murf_fast.resize(jbu.bundled()(projected, image), grid)[0], like)


def colours(projection: Tensor, clip: float = 0.01) -> Tensor:
    """(H, W, 3) in [0, 1]: every component stretched between its ``clip`` and ``1 - clip`` quantiles."""
    flat = projection.flatten(1).contiguous()
    low, high = torch.quantile(flat, torch.tensor([clip, 1 - clip], dtype=flat.dtype, device=flat.device), dim=1)
    stretched = (flat - low[:, None]) / (high - low).clamp_min(torch.finfo(flat.dtype).tiny)[:, None]
    return stretched.clamp(0, 1).reshape(projection.shape).permute(1, 2, 0)


def _matched(projection: Tensor, like: Tensor) -> Tensor:
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (projection, like))
    correlation = torch.nn.functional.normalize(b, dim=1) @ torch.nn.functional.normalize(a, dim=1).T
    strength, result = correlation.abs(), torch.empty_like(projection)
    for _ in range(3):
        to, source = divmod(int(strength.argmax()), 3)
        result[to] = projection[source] * (-1 if correlation[to, source] < 0 else 1)
        strength[to, :] = -1
        strength[:, source] = -1
    return result
