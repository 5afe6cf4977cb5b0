"""Names for what arguments may be, for annotations of code that passes them on; nothing here does anything.

``def features(mode: murf_fast.typing.Mode = "bilinear") -> Tensor`` is then as strict as the function that it calls.
"""

from __future__ import annotations

from typing import Literal

import torch

__all__ = ["Backend", "Metric", "Mode", "Precision", "Size", "SmoothMode"]

Size = int | tuple[int, int] | torch.Size
"""(height, width) in pixels, or one integer for a square; a part of a shape, ``x.shape[-2:]``, too."""

Mode = Literal["bilinear", "bicubic", "area", "nearest", "nearest-exact"]
"""An interpolation of :func:`murf_fast.resize`, and of all ops that resize."""

SmoothMode = Literal["bilinear", "bicubic"]
"""An interpolation of ops that resize within another formula."""

Backend = Literal["reference", "native", "triton"]
"""What computes a call."""

Metric = Literal["l2", "l2sq", "cosine", "ip"]
"""A distance, or the inner product, of :func:`murf_fast.nearest_distance`."""

Precision = Literal["auto", "float32", "bfloat16", "float16"]
"""What a bank of rows is kept in for the first look at it."""
