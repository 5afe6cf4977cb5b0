"""Maps resized to one grid and concatenated."""

from __future__ import annotations

from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import dense, dtype_tag, extension, prefer_huge_pages
from murf_fast.native._maps import Axes, maps_of

__all__ = ["upsample_concat"]


def upsample_concat(features: list[Tensor], axes: Axes, out: Tensor) -> None:
    """``out[:, c_s : c_s + C_s] = U_s features[s]``: maps (B, C_s, h_s, w_s), result (B, sum C_s, H, W)."""
    prefer_huge_pages(out)
    dtype = features[0].dtype
    data, channels_last = dense(out, dtype)
    maps, _copies = maps_of(features, axes, channels_last)
    kernel = extension.upsample_concat if channels_last else extension.upsample_concat_planar
    kernel(dtype=dtype_tag(dtype), maps=maps, grid=out.shape, out=data, threads=_fork.threads())
