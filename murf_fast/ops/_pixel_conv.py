"""A 3x3 convolution between two norms of a network over rows of pixels, as NAF's and JAFAR's encoders have it.

``out = conv( f(x) ) + bias`` with ``f`` a normalization by channel, and SiLU (``activate``), or nothing. What the norm
makes is never written as a map: it is applied to the pixels of a tile, or of a band, that is multiplied next. Returns
what the next normalization needs (``statistics``): mean and summed squared differences of every channel, in float64.

In float32 on the CPU by minimal filtering (Lavin and Gray, arXiv 1509.09308), F(2, 3) along columns and F(4, 3) along
rows: a third of the products, and 1.2 to 1.4 times the rounding of a direct sum. An input that is not finite reaches
all results of every tile that reads it, tiles being 2 x 4 pixels. In bfloat16 there by direct sums.

Inference only, and no operation of its own: the parts that need gradients run through plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from murf_fast import backends

# Results of a tile on the CPU, rows and columns.
TILE = (2, 4)


def pixel_conv_weight(weight: Tensor, backend: str) -> Tensor:
    """A convolution (C, I, 3, 3), in the dtype of the pixels, as :func:`pixel_conv` takes it."""
    return weight if backend == "reference" else backends.launcher(backend).pixel_conv_weight(weight)


def columns_read(begin: int, end: int, width: int) -> tuple[int, int]:
    """Columns of a map of which the results ``begin`` to ``end`` can be made bit for bit as of the whole map.

    Tiles start at the same columns, and what is read beyond is read; results beside those differ.
    """
    columns = TILE[1]
    last = -(-end // columns) * columns
    return max((begin - 1) // columns * columns, 0), min(last + (last == end), width)


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
    backend: str,
) -> tuple[Tensor, Tensor] | Any:
    """Args:
    x: (H * W, I), any strides.
    size: Height and width of the map.
    out: (rows * W, C), its rows dense; apart from ``x`` in memory.
    weight: Of :func:`pixel_conv_weight`.
    norm: Gain and offset (I,), float32.
    activate: Whether SiLU follows the norm.
    bias: (C,), float32.
    reflect: Whether pixels beyond the border are mirrored, of maps from 2 x 2, or zero (after the norm).
    rows: Which rows of the result are made, (begin, end); None: all. From an even row on, bit for bit those of all.
    statistics: Whether to return them.
    """
    options = {"weight": weight, "norm": norm, "activate": activate, "bias": bias, "reflect": reflect, "rows": rows}
    launch = _definition if backend == "reference" else backends.launcher(backend).pixel_conv
    return launch(x, size, out, statistics=statistics, **options)


def _definition(x, size, out, *, weight, norm, activate, bias, reflect, rows, statistics):
    """For tests; in the dtype of ``x``."""
    y = x
    if norm is not None:
        y = y * norm[0].to(y.dtype) + norm[1].to(y.dtype)
        y = F.silu(y) if activate else y
    map_ = y.T.unflatten(1, tuple(size))[None]
    map_ = F.pad(map_, (1, 1, 1, 1), mode="reflect" if reflect else "constant")
    begin, end = rows or (0, size[0])
    y = F.conv2d(map_[:, :, begin : end + 2], weight.to(y.dtype), None if bias is None else bias.to(y.dtype))
    y = y[0].flatten(1).T
    out.copy_(y)
    mean = y.double().mean(0)
    return (mean, (y.double() - mean).square().sum(0)) if statistics else None
