"""One layer on rows of pixels; see :mod:`murf_fast.ops._pixel_linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import address, dtype_tag, empty, extension, place, prefer_huge_pages, rows_at
from murf_fast.tables.moments import join

__all__ = ["pixel_linear"]

# Pixels whose statistics are summed apart: a multiple of every level's tiles, enough parts for many threads. The sums
# must not depend on the threads.
PIXEL_CHUNK = 1536


def pixel_linear(
    x: Tensor,
    out: Tensor,
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    unit_eps: float | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
    heads: int = 1,
    statistics: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """``x`` (P, I), ``out`` (P, C), weight and residual, float32 or bfloat16; the other arguments and the result are
    those of :mod:`murf_fast.ops._pixel_linear`.
    """
    prefer_huge_pages(out)
    (pixels, channels), inputs, dtype, single = out.shape, x.shape[1], out.dtype, torch.float32
    chunks = -(-pixels // PIXEL_CHUNK)
    parts = empty((chunks, 2, channels), torch.float64) if statistics else None
    gain, shift = norm or (None, None)
    rows, columns = rotation or (None, None)
    width = 0 if columns is None else len(columns)
    if channels % heads:
        raise ValueError(f"murf_fast: {heads} heads do not divide {channels} channels")
    if weight is None and inputs != channels:
        raise ValueError(f"murf_fast: without a weight a layer keeps its {inputs} channels, got {channels}")
    layer = extension.PixelLinear(
        pixels=pixels,
        in_channels=inputs,
        out_channels=channels,
        chunk=PIXEL_CHUNK,
        width=width,
        x=place(x, dtype, (pixels, inputs)),
        x_strides=x.stride(),
        gain=address(gain, single, inputs),
        offset=address(shift, single, inputs),
        unit=unit_eps is not None,
        eps=unit_eps or 0.0,
        weight=address(weight, dtype, inputs * channels),
        bias=address(bias, single, channels),
        residual=address(residual, dtype, pixels * channels),
        rotate_rows=address(rows, single, pixels // max(width, 1) * 2 * channels),
        rotate_columns=address(columns, single, width * 2 * channels),
        rotate_group=channels // heads,
        out=rows_at(out, dtype),
        out_stride=out.stride(0),
        statistics=address(parts, torch.float64, chunks * 2 * channels),
    )
    extension.pixel_linear(dtype=dtype_tag(dtype), layer=layer, threads=_fork.threads())
    return None if parts is None else join(parts, PIXEL_CHUNK, pixels)
