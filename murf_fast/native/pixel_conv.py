"""A 3x3 convolution on rows of pixels; see :mod:`murf_fast.ops._pixel_conv`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import address, empty, extension, place, prefer_huge_pages, rows_at, same_shape
from murf_fast.tables.moments import join

__all__ = ["pixel_conv", "pixel_conv_weight"]

# As the kernel has them: tiles of results, the points of their products, and columns that lie together.
TILE, PANEL, LANES = (2, 4), 64, 16
SIDE = 32  # of the blocks of a direct sum
_POINTS = (0.0, 1.0, -1.0), (0.0, 0.75, -0.75, 1.5, -1.5)


def _factors(points: Sequence[float]) -> Tensor:
    """(points + 1, 3), float64: a filter of three taps as its values at the points, over the products of their
    differences, and at infinity.
    """
    rows = []
    for p in points:
        scale = 1.0
        for other in points:
            scale *= p - other if other != p else 1.0
        rows.append([p**power / scale for power in range(3)])
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64, device="cpu")


def pixel_conv_weight(weight: Tensor) -> Tensor:
    """A convolution (C, I, 3, 3) as its kernel reads it: float32 (24, panels of 64 columns, I, columns), by minimal
    filtering; bfloat16 by direct sums, in blocks of 32 x 32, each of two halves of 16 columns of 16 pairs of rows.
    """
    if weight.dtype == torch.bfloat16:
        channels, inputs = (-(-n // SIDE) for n in weight.shape[:2])
        filled = F.pad(weight, (0, 0, 0, 0, 0, -weight.shape[1] % SIDE, 0, -weight.shape[0] % SIDE))
        blocks = filled.view(channels, 2, 16, inputs, 16, 2, 9)
        return blocks.permute(0, 6, 3, 1, 4, 2, 5).contiguous()
    (channels, inputs), taps = weight.shape[:2], weight.double().permute(2, 3, 1, 0).reshape(9, -1)
    made = (torch.kron(*(_factors(points) for points in _POINTS)) @ taps).view(-1, inputs, channels).float()
    made = F.pad(made, (0, -made.shape[2] % LANES))
    return torch.cat([panel.flatten(1) for panel in made.split(PANEL, 2)], 1).contiguous()


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
    """``x`` (H * W, I) and ``out`` (rows * W, C), float32 or bfloat16; the other arguments and the result are those of
    :mod:`murf_fast.ops._pixel_conv`.
    """
    prefer_huge_pages(out)
    (height, width), inputs, dtype, single = size, x.shape[1], out.dtype, torch.float32
    begin, end = rows or (0, height)
    if not 0 <= begin < end <= height or (reflect and min(height, width) < 2):
        raise ValueError(f"murf_fast: a convolution of {height} x {width} pixels cannot make rows {begin} to {end}")
    pixels, channels = (end - begin) * width, out.shape[1]
    same_shape(out, (pixels, channels))
    strips = -(-(end - begin) // TILE[0])
    parts = empty((strips, 2, channels), torch.float64) if statistics else None
    gain, offset = norm or (None, None)
    direct = dtype == torch.bfloat16
    if direct:
        entries = 9 * (inputs + -inputs % SIDE) * (channels + -channels % SIDE)
    else:
        entries = 24 * inputs * (channels + -channels % LANES)
    layer = extension.PixelConv(
        height=height,
        width=width,
        in_channels=inputs,
        out_channels=channels,
        rows=(begin, end),
        x=place(x, dtype, (height * width, inputs)),
        x_strides=x.stride(),
        gain=address(gain, single, inputs),
        offset=address(offset, single, inputs),
        activate=activate,
        reflect=reflect,
        weight=address(weight, dtype, entries),
        bias=address(bias, single, channels),
        out=rows_at(out, dtype),
        out_stride=out.stride(0),
        statistics=address(parts, torch.float64, strips * 2 * channels),
    )
    launch = extension.pixel_conv_direct if direct else extension.pixel_conv
    launch(layer=layer, threads=_fork.threads())
    return None if parts is None else join(parts, TILE[0] * width, pixels)
