"""Bilateral kernels and their convolutions, band by band."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import empty
from murf_fast.native.adaptive_conv import Axes, adaptive_conv_band
from murf_fast.native.bilateral_kernels import Network, kernels_of_rows

__all__ = ["joint_bilateral_upsample"]

# Bytes of per-pixel kernels that are held at a time: few calls, and little beside the result.
_KERNEL_BYTES = 16 << 20


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
    """Band by band of output rows: their kernels, then every source through them. ``outs`` and the ``axes`` of rows are
    those of the guidance from row ``top`` on.
    """
    network = Network(guidance, params, range_mask, fixup_mask, radius)
    (batch, _, _, width), height = guidance.shape, outs[0].shape[2]
    row_floats = batch * width * (2 * radius + 1) ** 2
    # At least sixteen rows for every thread, and an even number: at a doubling, pairs of rows share their windows.
    band = max(-(-16 * _fork.threads() // batch), _KERNEL_BYTES // (4 * row_floats)) // 2 * 2
    band = max(2, min(band, height))
    kernels = empty((min(band, height) * row_floats,), torch.float32)
    for begin in range(0, height, band):
        rows = (begin, min(begin + band, height))
        shape = (batch, rows[1] - begin, width, (2 * radius + 1) ** 2)
        of_rows = kernels[: (rows[1] - begin) * row_floats].view(shape).permute(0, 3, 1, 2)
        kernels_of_rows(network, guidance, (top + rows[0], top + rows[1]), of_rows)
        for source, pair, out in zip(sources, axes, outs, strict=True):
            adaptive_conv_band(source, of_rows, bias, pair, out, rows)
