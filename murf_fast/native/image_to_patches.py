"""An image resized, normalized and cut into patches."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import dtype_tag, extension, place, prefer_huge_pages, same_shape
from murf_fast.tables.resize import AxisTable

__all__ = ["image_to_patches"]


def image_to_patches(
    image: Tensor,
    axes: tuple[AxisTable, AxisTable],
    patch_size: int,
    gain: tuple[float, float, float],
    offset: tuple[float, float, float],
    channels_first: bool,
    out: Tensor,
) -> None:
    """``image``: a (B, 3, H, W) view; ``out`` (B, patches, 3 p p or more), whose batch and rows may have any stride.

    What is more becomes zeros.
    """
    prefer_huge_pages(out)
    image = image if image.stride(3) == 1 or image.stride()[1::2] == (1, 3) else image.contiguous()
    y, x = axes
    batch, height, width = image.shape[0], y.in_size, x.in_size
    is_uint8 = image.dtype == torch.uint8
    patches = (y.out_size // patch_size) * (x.out_size // patch_size)
    columns = 3 * patch_size**2
    if out.shape[2] > columns:
        out, padding = out.tensor_split([columns], dim=2)
        padding.zero_()
    same_shape(out, (batch, patches, columns))
    if out.stride(2) != 1:
        raise ValueError(f"murf_fast: rows of patches must be contiguous for a kernel, got strides {out.stride()}")
    extension.image_to_patches(
        is_uint8=is_uint8,
        dtype=dtype_tag(out.dtype) if is_uint8 else dtype_tag(image.dtype),
        out_dtype=dtype_tag(out.dtype),
        image=extension.Image(
            data=place(image, image.dtype, (batch, 3, height, width)),
            batch=batch,
            height=height,
            width=width,
            strides=image.stride(),
        ),
        y=y.native,
        x=x.native,
        rows=extension.PatchRows(
            patch=patch_size,
            stride_b=out.stride(0),
            stride_row=out.stride(1),
            channels_first=channels_first,
            gain=gain,
            offset=offset,
        ),
        out=place(out, out.dtype),
        threads=_fork.threads(),
    )
