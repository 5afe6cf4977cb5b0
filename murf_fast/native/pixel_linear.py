"""One layer on rows of pixels; see :mod:`murf_fast.ops._pixel_linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast._extension import module
from murf_fast.native._address import address, empty, prefer_huge_pages, strided
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
    statistics: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """``x`` (P, I) and ``out`` (P, C), float32; the other arguments and the result are those of
    :mod:`murf_fast.ops._pixel_linear`.
    """
    prefer_huge_pages(out)
    (pixels, channels), inputs, single = out.shape, x.shape[1], torch.float32
    chunks = -(-pixels // PIXEL_CHUNK)
    parts = empty((chunks, 2, channels), torch.float64) if statistics else None
    gain, shift = norm or (None, None)
    rows, columns = rotation or (None, None)
    width = 0 if columns is None else len(columns)
    if weight is None and inputs != channels:
        raise ValueError(f"murf_fast: without a weight a layer keeps its {inputs} channels, got {channels}")
    layer = (
        (pixels, inputs, channels, PIXEL_CHUNK, width),
        *strided(x, single, (pixels, inputs)),
        address(gain, single, inputs),
        address(shift, single, inputs),
        (unit_eps is not None, unit_eps or 0.0),
        address(weight, single, inputs * channels),
        address(bias, single, channels),
        address(residual, single, pixels * channels),
        address(rows, single, pixels // max(width, 1) * 2 * channels),
        address(columns, single, width * 2 * channels),
        address(out, single, pixels * channels),
        address(parts, torch.float64, chunks * 2 * channels),
    )
    module().pixel_linear(layer, _fork.threads())
    return None if parts is None else join(parts, PIXEL_CHUNK, pixels)
