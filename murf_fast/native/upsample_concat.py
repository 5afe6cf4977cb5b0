"""Maps resized to one grid and concatenated."""

from __future__ import annotations

from torch import Tensor

from murf_fast import _fork
from murf_fast._extension import module
from murf_fast.native._address import dense, dtype_tag, prefer_huge_pages
from murf_fast.native._maps import Axes, Maps, is_channels_last
from murf_fast.native.upsample_sum import sum_planar

__all__ = ["upsample_concat"]


def upsample_concat(features: list[Tensor], axes: Axes, out: Tensor) -> None:
    """``out[:, c_s : c_s + C_s] = U_s features[s]``: maps (B, C_s, h_s, w_s), result (B, sum C_s, H, W)."""
    prefer_huge_pages(out)
    if is_channels_last(out):
        maps = Maps(features, axes, channels_last=True)
        module().upsample_concat(dtype_tag(out), maps.tuples, tuple(out.shape), dense(out, maps.dtype), _fork.threads())
        return
    begin = 0
    for feature, pair in zip(features, axes, strict=True):
        sum_planar([feature], [pair], None, out[:, begin : begin + feature.shape[1]])
        begin += feature.shape[1]
