"""Feature maps as colours: three principal components to red, green and blue."""

from __future__ import annotations

import torch
from torch import Tensor

import murf_fast
from murf_fast.demo import jbu


def fused_projection(maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """First three components of the maps fused on the largest map's grid and shown on ``grid``: (3, H, W).

    A projection is a 1x1 convolution, hence a linear head; by way of the largest grid, as in MuRF.
    """
    largest = max((tuple(m.shape[2:]) for m in maps), key=lambda side: side[0] * side[1])
    mean, axes = _components(murf_fast.upsample_concat(maps, largest))
    return murf_fast.linear_head(maps, axes.T.contiguous(), -(mean @ axes), size=grid, via=largest)[0]


def single_projection(feature: Tensor, grid: tuple[int, int], like: Tensor) -> Tensor:
    """First three components of one map, shown on ``grid``: (3, H, W).

    Sign and order of components are arbitrary: those of ``like`` (3, H, W) with the largest correlation are taken.
    """
    mean, axes = _components(feature)
    projected = torch.einsum("bchw,ck->bkhw", feature - mean.reshape(1, -1, 1, 1), axes)
    return _matched(murf_fast.resize(projected, grid)[0], like)


def upsampled_projection(feature: Tensor, image: Tensor, grid: tuple[int, int], like: Tensor) -> Tensor:
    """As :func:`single_projection`, but sixteen times as fine along the image's edges: FeatUp's upsampler.

    It is linear and treats channels alike: three components take its way instead of all channels.
    """
    mean, axes = _components(feature)
    projected = torch.einsum("bchw,ck->bkhw", feature - mean.reshape(1, -1, 1, 1), axes)
    return _matched(murf_fast.resize(jbu.bundled()(projected, image), grid)[0], like)


def colours(projection: Tensor, clip: float = 0.01) -> Tensor:
    """(H, W, 3) in [0, 1]: every component stretched between its ``clip`` and ``1 - clip`` quantiles."""
    flat = projection.flatten(1).contiguous()
    low, high = torch.quantile(flat, torch.tensor([clip, 1 - clip]), dim=1)
    stretched = (flat - low[:, None]) / (high - low).clamp_min(torch.finfo(flat.dtype).tiny)[:, None]
    return stretched.clamp(0, 1).reshape(projection.shape).permute(1, 2, 0)


def _components(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C,) and first three principal axes (C, 3) of the pixels of a map, by the covariance's eigenvectors."""
    tokens = feature[0].flatten(1).T.double()
    mean = tokens.mean(0)
    centred = tokens - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors[:, -3:].flip(1)
    # An eigenvector's sign is arbitrary; its largest entry is made positive.
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    axes = axes * torch.where(largest < 0, -1.0, 1.0)
    return mean.to(feature.dtype), axes.to(feature.dtype)


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
