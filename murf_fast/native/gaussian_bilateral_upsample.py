"""Joint bilateral upsampling with a Gaussian for every cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import address, dtype_tag, empty, extension, prefer_huge_pages, strided
from murf_fast.tables.disk import disk_counts

__all__ = ["gaussian_bilateral_upsample", "gaussian_bilateral_upsample_backward"]

# Values of a pixel begin on cache lines.
_LINE = 16


def gaussian_bilateral_upsample(
    features: Tensor, guidance: Tensor, cells: Tensor, radii: Tensor | None, radius: int, out: Tensor
) -> None:
    """Features (B, C, h, w), guidance (B, G, H, W) float32, cells (B, h, w, 5 + G) float32 as the op makes them, radii
    (B, 1, H, W) uint8 or None for ``radius``; ``out`` (B, C, H, W) of any strides in the dtype of the features.
    """
    prefer_huge_pages(out)
    upsampling, held = _upsampling(features, guidance, cells, radii, radius)
    extension.gaussian_bilateral_upsample(
        dtype=dtype_tag(features.dtype),
        upsampling=upsampling,
        out=strided(out, features.dtype, (*features.shape[:2], *guidance.shape[2:])),
        threads=_fork.threads(),
    )
    del held


def gaussian_bilateral_upsample_backward(
    grad: Tensor,
    features: Tensor,
    guidance: Tensor,
    cells: Tensor,
    radii: Tensor | None,
    radius: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the features and of the guidance, and the sums (B, h, w, 4 + G) that those of the cells' maps are
    made of; all float32, None where not wanted.
    """
    upsampling, held = _upsampling(features, guidance, cells, radii, radius)
    batch, channels, h, w = features.shape
    padded, single = held.shape[3], torch.float32
    of_values = empty((batch, h, w, padded), single) if wanted[0] else None
    of_guidance = empty(tuple(guidance.shape), single) if wanted[1] else None
    sums = empty((batch, h, w, 4 + guidance.shape[1]), single) if wanted[2] else None
    extension.gaussian_bilateral_upsample_backward(
        dtype=dtype_tag(grad.dtype),
        upsampling=upsampling,
        grad=strided(grad, features.dtype, (batch, channels, *guidance.shape[2:])),
        shares=_shares(features, guidance, radius),
        grad_values=address(of_values, single, 0),
        grad_guidance=address(of_guidance, single, 0),
        sums=address(sums, single, 0),
        threads=_fork.threads(),
    )
    return None if of_values is None else of_values[..., :channels].permute(0, 3, 1, 2), of_guidance, sums


def _upsampling(features: Tensor, guidance: Tensor, cells: Tensor, radii: Tensor | None, radius: int) -> Any:
    """What both kernels take, and the copy of the features that it points into: float32 pixels of whole cache lines."""
    (batch, channels, h, w), (_, guides, height, width) = features.shape, guidance.shape
    single = torch.float32
    padded = -(-channels // _LINE) * _LINE
    if features.dtype is single and channels == padded and features.is_contiguous(memory_format=torch.channels_last):
        values = features.permute(0, 2, 3, 1)
    else:
        values = features.new_zeros((batch, h, w, padded), dtype=single)
        values[..., :channels] = features.permute(0, 2, 3, 1)
    upsampling = extension.GaussianBilateral(
        batch=batch,
        channels=channels,
        height=h,
        width=w,
        out_height=height,
        out_width=width,
        guides=guides,
        radius=radius,
        values=address(values, single, batch * h * w * padded),
        guidance=strided(guidance, single, (batch, guides, height, width)),
        cells=address(cells, single, batch * h * w * (5 + guides)),
        radii=address(radii, torch.uint8, batch * height * width),
        counts=address(disk_counts(radius, values.device), single, 9 * (radius + 1) ** 3),
    )
    return upsampling, values


def _shares(features: Tensor, guidance: Tensor, radius: int) -> int:
    """Bands of rows of cells whose gradients are summed apart: at most 32, and as few as keep all sums within the
    result. Depends on shapes alone, and with it the order of every sum.
    """
    _, channels, h, w = features.shape
    guides, height, width = guidance.shape[1:]
    bands = 1
    while bands < min(h, 32):
        more = min(2 * bands, h)
        rows = min(h, -(-h // more) + 2 * radius)
        if more * rows * w * (channels + 4 + guides) > max(channels, guides) * height * width:
            break
        bands = more
    return bands
