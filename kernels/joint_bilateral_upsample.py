"""One level of a joint bilateral upsampler in bands: their kernels, then every source through them."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from murf_fast.kernels import folded, launch
from murf_fast.kernels.adaptive_conv import Axes, adaptive_conv_band, conv_tile
from murf_fast.kernels.bilateral_kernels import kernels_of_band
from murf_fast.kernels.bilateral_network import Network

__all__ = ["joint_bilateral_upsample"]


def joint_bilateral_upsample(
    sources: list[Tensor],
    guidance: Tensor,
    params: list[Tensor],
    range_mask: Tensor | None,
    fixup_mask: Tensor | None,
    top: int,
    radius: int,
    bias: Tensor | None,
    axes: list[Axes],
    outs: list[Tensor],
) -> None:
    """Without gradients: a band's kernels stay in the L2 cache until its sources have been through them. ``outs`` and
    the ``axes`` of rows are those of the guidance from row ``top`` on.
    """
    with launch.on_device_of(guidance):
        net = Network(guidance, params, range_mask, fixup_mask, radius)
        rows = max(conv_tile(out).rows for out in outs)
        row_bytes = max(folded.row_bytes(*pair) for pair in axes)
        for band in net.bands(rows, row_bytes, outs[0].shape[2]):
            kernels = net.empty(band.images, band.rows, guidance.shape[3], net.taps).permute(0, 3, 1, 2)
            kernels_of_band(net, replace(band, row=top + band.row), kernels)
            for source, pair, out in zip(sources, axes, outs, strict=True):
                adaptive_conv_band(source, kernels, bias, pair, out, band)
