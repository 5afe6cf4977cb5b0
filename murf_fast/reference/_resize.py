"""The resize that every reference is built on: ``torch.nn.functional.interpolate``, once or twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast.annotations import Mode
from murf_fast.tables.resize import NEAREST, scaled_size


def resize_map(
    x: Tensor,
    size: Sequence[int],
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: Sequence[int] | None = None,
    scale_factor: Sequence[float] | None = None,
) -> Tensor:
    """``x`` (B, C, h, w) at ``size``, by way of ``via`` if given."""
    if via:
        x = resize_map(x, via, mode, antialias)
    if antialias and x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        # torch has no antialiased CPU kernel for them; people upcast, as transformers does for position embeddings.
        return resize_map(x.float(), size, mode, antialias, None, scale_factor).to(x.dtype)
    if mode in NEAREST:
        # torch's channels_last kernel rounds some positions otherwise; results must not depend on the layout.
        x = x.contiguous()
    filtered = mode in ("bilinear", "bicubic")
    if filtered and scale_factor and any(n == m for n, m in zip(size, x.shape[2:], strict=True)):
        return _axis_by_axis(x, scale_factor, mode, antialias)
    options: dict[str, Any] = {"align_corners": False, "antialias": antialias} if filtered else {}
    target: dict[str, Any] = {"scale_factor": tuple(scale_factor)} if scale_factor else {"size": tuple(size)}
    if antialias and size[1] == 1 and size[0] != 1:
        # torch's CPU kernel gives every row the weights of row 0 when only the width is 1; swapping the axes avoids it.
        target = {k: v[::-1] for k, v in target.items()}
        return F.interpolate(x.mT, mode=mode, **target, **options).mT
    return F.interpolate(x, mode=mode, **target, **options)


def averaged(x: Tensor, size: Sequence[int]) -> Tensor:
    """Adaptive average pooling of ``x`` (B, C, h, w) to ``size``."""
    height, width = size
    return F.adaptive_avg_pool2d(x, (height, width))


def _axis_by_axis(x: Tensor, scale_factor: Sequence[float], mode: str, antialias: bool) -> Tensor:
    """Where a factor keeps the size of an axis, torch's gradient of the whole is not that of its result: it applies the
    factor to an axis that was copied, or copies one that was not. Of single axes it is.
    """
    dtype = x.dtype
    options: dict[str, Any] = {"mode": mode, "antialias": antialias, "align_corners": False}
    x = x.to(torch.promote_types(dtype, torch.float32))
    for dim, factor in ((2, scale_factor[0]), (3, scale_factor[1])):
        kept = scaled_size(x.shape[dim], factor) == x.shape[dim]
        if kept and (mode == "bilinear" or antialias):
            continue
        rows = x.transpose(dim, 3)
        if kept:
            # Lines by themselves, each doubled across: so the map as a whole does not keep its size.
            lines = rows.flatten(0, 2)[:, None, None]
            resized = F.interpolate(lines, scale_factor=(2.0, factor), **options)[:, 0, 0].view(rows.shape)
        else:
            resized = F.interpolate(rows, scale_factor=(1.0, factor), **options)
        x = resized.transpose(dim, 3)
    return x.to(dtype)
