"""Maps resized to one grid and summed."""

from __future__ import annotations

from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import dense, dtype_tag, extension, prefer_huge_pages
from murf_fast.native._maps import Axes, bias_of, maps_of

__all__ = ["upsample_sum"]


def upsample_sum(features: list[Tensor], axes: Axes, bias: Tensor | None, out: Tensor) -> None:
    """``out = sum_s U_s features[s] + bias``: maps (B, C, h_s, w_s), bias (1, C) or (B, C), result (B, C, H, W)."""
    prefer_huge_pages(out)
    dtype = features[0].dtype
    data, channels_last = dense(out, dtype)
    maps, _copies = maps_of(features, axes, channels_last)
    shape = _, channels, height, width = out.shape
    extension.upsample_sum(
        dtype=dtype_tag(dtype),
        maps=maps,
        grid=shape,
        bias=bias_of(bias, shape),
        out=data,
        channels_last=channels_last,
        out_stride_b=channels * height * width,
        threads=_fork.threads(),
    )
