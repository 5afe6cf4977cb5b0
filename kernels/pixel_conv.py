"""A 3x3 convolution on rows of pixels: see :mod:`murf_fast.ops._pixel_conv`.

The product is torch's (cuDNN), over bands of rows; norm, activation and statistics are passes of
:mod:`murf_fast.kernels.pixel_linear` over a band.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast.kernels.moments import join
from murf_fast.kernels.pixel_linear import pixel_linear

__all__ = ["pixel_conv", "pixel_conv_weight"]

# Bytes of a band's activations: enough to fill a GPU.
BAND_BYTES = 256 << 20


def pixel_conv_weight(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


def pixel_conv(
    x: Tensor,
    size: Sequence[int],
    out: Tensor,
    *,
    weight: Tensor,
    norm: tuple[Tensor, Tensor] | None = None,
    activate: bool = True,
    bias: Tensor | None = None,
    reflect: bool = False,
    rows: tuple[int, int] | None = None,
    statistics: bool = False,
) -> tuple[Tensor, Tensor] | None:
    height, width = size
    begin, end = rows or (0, height)
    step = max(8, BAND_BYTES // (width * max(x.shape[1], out.shape[1]) * x.element_size()))
    parts = []
    for first in range(begin, end, step):
        last = min(first + step, end)
        band = _band(x, size, first - 1, last + 1, norm, activate, reflect)
        made = F.conv2d(band, weight).permute(0, 2, 3, 1).flatten(0, 2)
        to = out[(first - begin) * width : (last - begin) * width]
        parts.append(pixel_linear(made, to, bias=bias, statistics=statistics))
    if not statistics:
        return None
    if len(parts) == 1:
        return parts[0]
    return join(torch.stack([torch.stack(part) for part in parts]), step * width, len(out))


def _band(x, size, first, last, norm, activate, reflect) -> Tensor:
    """Rows ``first`` to ``last``, one beyond the map at most, normalized, with a border of columns; (1, I, rows, W)."""
    height, width = size
    from_, to = max(first, 0), min(last, height)
    band = x[from_ * width : to * width]
    if norm is not None and activate:
        made = torch.empty(band.shape, dtype=x.dtype, device=x.device)
        pixel_linear(band, made, norm=norm)
        band = made
    elif norm is not None:
        band = torch.addcmul(norm[1], band.float(), norm[0]).to(x.dtype)
    band = band.view(1, to - from_, width, -1).permute(0, 3, 1, 2)
    border, mode = (1, 1, from_ - first, last - to), "reflect" if reflect else "constant"
    return F.pad(band, border, mode=mode).contiguous(memory_format=torch.channels_last)
