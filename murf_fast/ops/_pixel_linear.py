"""One layer of a pointwise network over rows of pixels, which the image encoders are chains of.

``out = rotate( f(x) W + bias + residual )`` with ``f`` a normalization by channel and SiLU (``norm``, a pair gain and
offset), a division by the root mean square of the row (``unit_eps``) or nothing, and any of the other parts left out.
``rotate`` is AnyUp's position mixing: ``y cos(a) + turned(y) sin(a)``, ``turned(y) = (-second half, first half)``, with
angles ``a`` that are the sum of one of the pixel's row and one of its column; with ``heads`` it pairs the halves of
every head, as NAF's rotary embedding does. Returns what the next normalization needs (``statistics``): mean and summed
squared differences of every channel, in float64.

Inference only, and no operation of its own: the parts that need gradients run through plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from murf_fast import backends


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
    backend: str,
) -> tuple[Tensor, Tensor] | Any:
    """Args:
    x: (pixels, in), any strides.
    out: (pixels, C), its rows dense; may be ``x`` or ``residual``.
    norm: Gain and offset (in,), float32.
    unit_eps: Added to the mean square.
    weight: (in, C), dense, in the dtype of ``x``; None: ``in`` is C.
    bias: (C,), float32.
    residual: (pixels, C), dense.
    rotation: Cosines and sines of the angles of rows (H, 2, C) and columns (W, 2, C), float32; pixels are H * W.
    heads: Of the rotation; contiguous groups of channels.
    statistics: Whether to return them.
    """
    options = {"norm": norm, "unit_eps": unit_eps, "weight": weight, "bias": bias, "residual": residual}
    launch = _definition if backend == "reference" else backends.launcher(backend).pixel_linear
    return launch(x, out, rotation=rotation, heads=heads, statistics=statistics, **options)


def _definition(x, out, *, norm, unit_eps, weight, bias, residual, rotation, heads, statistics):
    """For tests; in the dtype of ``x``."""
    y = x
    if norm is not None:
        y = torch.nn.functional.silu(y * norm[0].to(y.dtype) + norm[1].to(y.dtype))
    if unit_eps is not None:
        y = y * (y.square().mean(1, keepdim=True) + unit_eps).rsqrt()
    y = y if weight is None else y @ weight.to(y.dtype)
    for term in (bias, residual):
        y = y if term is None else y + term.to(y.dtype)
    if rotation is not None:
        (row_cosine, row_sine), (cosine, sine) = (t.to(y.dtype).unbind(1) for t in rotation)
        both = row_cosine[:, None] * cosine - row_sine[:, None] * sine
        turning = row_sine[:, None] * cosine + row_cosine[:, None] * sine
        first, second = y.unflatten(1, (heads, 2, -1)).unbind(2)
        y = y * both.flatten(0, 1) + torch.stack([-second, first], 2).flatten(1) * turning.flatten(0, 1)
    out.copy_(y)
    mean = y.double().mean(0)
    return (mean, (y.double() - mean).square().sum(0)) if statistics else None
