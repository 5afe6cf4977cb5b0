"""Principal components of feature maps, the usual way to look at them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from murf_fast.ops.linear_head import linear_head
from murf_fast.ops.upsample_concat import upsample_concat


def principal_axes(feature: Tensor, components: int = 3) -> tuple[Tensor, Tensor]:
    """Mean (C,) and leading principal axes (C, components) of the pixels of a map (B, C, H, W), all images together.

    By the eigenvectors of the covariance in float64, in the dtype of the map. An eigenvector's sign is arbitrary: its
    largest entry is made positive.
    """
    tokens = feature.permute(0, 2, 3, 1).flatten(0, 2).double()
    mean = tokens.mean(0)
    centred = tokens - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors[:, -components:].flip(1)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    axes = axes * torch.where(largest < 0, -1.0, 1.0)
    return mean.to(feature.dtype), axes.to(feature.dtype)


def fused_projection(maps: Sequence[Tensor], size: tuple[int, int], components: int = 3) -> Tensor:
    """Leading components of maps concatenated on their largest grid, shown at ``size``: (B, components, H, W).

    A projection is a 1x1 convolution, hence a linear head: only ``components`` channels are resized to ``size``, by way
    of the largest grid as in MuRF.
    """
    return common_projection([maps], [size], components)[0]


def common_projection(
    images: Sequence[Sequence[Tensor]], sizes: Sequence[tuple[int, int]], components: int = 3
) -> list[Tensor]:
    """:func:`fused_projection` of the maps of several images or batches, by the components of all of them together."""
    grids = [(max(m.shape[2] for m in maps), max(m.shape[3] for m in maps)) for maps in images]
    fused = [
        upsample_concat(maps, grid, memory_format=torch.channels_last) for maps, grid in zip(images, grids, strict=True)
    ]
    # One batch as it is, several as the pixels of one.
    pixels = (
        fused[0] if len(fused) == 1 else torch.cat([f.transpose(0, 1).flatten(1) for f in fused], 1)[None, ..., None]
    )
    mean, axes = principal_axes(pixels, components)
    weight, bias = axes.T.contiguous(), -(mean @ axes)
    return [
        linear_head(maps, weight, bias, size=size, via=grid)
        for maps, size, grid in zip(images, sizes, grids, strict=True)
    ]
