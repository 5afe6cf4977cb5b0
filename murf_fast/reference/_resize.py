"""The resize that every reference is built on: ``torch.nn.functional.interpolate``, once or twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast.resample import NEAREST


def resize_map(
    x: Tensor,
    size: Sequence[int],
    mode: str = "bilinear",
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
    options = {"align_corners": False, "antialias": antialias} if filtered else {}
    target = {"scale_factor": tuple(scale_factor)} if scale_factor else {"size": tuple(size)}
    if antialias and size[1] == 1 and size[0] != 1:
        # torch's CPU kernel gives every row the weights of row 0 when only the width is 1; swapping the axes avoids it.
        target = {k: v[::-1] for k, v in target.items()}
        return F.interpolate(x.mT, mode=mode, **target, **options).mT
    return F.interpolate(x, mode=mode, **target, **options)
