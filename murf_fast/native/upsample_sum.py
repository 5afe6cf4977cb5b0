"""Maps resized to one grid and summed."""

from __future__ import annotations

from torch import Tensor

from murf_fast import _fork
from murf_fast._extension import module
from murf_fast.native._address import dense, dtype_tag, no_memory, prefer_huge_pages, refuse
from murf_fast.native._maps import Axes, Maps, bias_of, is_channels_last

__all__ = ["upsample_sum"]


def upsample_sum(features: list[Tensor], axes: Axes, bias: Tensor | None, out: Tensor) -> None:
    """``out = sum_s U_s features[s] + bias``: maps (B, C, h_s, w_s), bias (1, C) or (B, C), result (B, C, H, W)."""
    prefer_huge_pages(out)
    if not is_channels_last(out):
        sum_planar(features, axes, bias, out)
        return
    maps = Maps(features, axes, channels_last=True)
    shape = out.shape
    address = dense(out, maps.dtype)
    module().upsample_sum(
        dtype_tag(out), maps.tuples, shape, bias_of(bias, shape), address, True, out.stride(0), _fork.threads()
    )


def sum_planar(features: list[Tensor], axes: Axes, bias: Tensor | None, out: Tensor) -> None:
    maps = Maps(features, axes, channels_last=False)
    shape = out.shape
    if out.dtype is not maps.dtype or not out.is_cpu or not (out.is_contiguous() or out[:1].is_contiguous()):
        refuse(out, maps.dtype, "contiguous images")
    module().upsample_sum(
        dtype_tag(out),
        maps.tuples,
        shape,
        bias_of(bias, shape),
        out.data_ptr() or no_memory(out),
        False,
        out.stride(0),
        _fork.threads(),
    )
