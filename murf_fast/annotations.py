"""Names for what arguments may be, for annotations of code that passes them on; nothing here does anything.

``def features(image: Tensor, mode: Mode = "bilinear") -> Tensor`` is then as strict as the function that it calls.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Union

import numpy as np
import torch

if TYPE_CHECKING:
    import PIL.Image

__all__ = [
    "AnomalyMethod",
    "AnomalyRules",
    "Attention",
    "Backend",
    "BankIndex",
    "Border",
    "Distance",
    "HeadGrid",
    "Image",
    "Integers",
    "Keep",
    "Layout",
    "Metric",
    "Mode",
    "Norm",
    "Padding",
    "PixelMap",
    "PositionFlavor",
    "Precision",
    "Projection",
    "Reduce",
    "Remainder",
    "Rounding",
    "SharpInput",
    "Size",
    "Sizes",
    "SmoothMode",
    "SubsetKind",
    "TileFusion",
    "Tiling",
    "Values",
]

Integers = Sequence[int | np.integer[Any]] | np.ndarray[Any, np.dtype[np.integer[Any]]]
"""Several integers, Python's or NumPy's: a sequence, or an array of one dimension."""

Size = int | np.integer[Any] | Integers
"""(height, width) in pixels, or one integer, Python's or NumPy's, for a square.

Parts of shapes, ``x.shape[-2:]``, have no length for a type checker, so that this has none; a wrong one raises."""

Sizes = Sequence[Size] | np.ndarray[Any, np.dtype[np.integer[Any]]]
"""One size for every resolution, or an array of one dimension of the sides of squares."""

Image = Union[torch.Tensor, "np.ndarray[Any, Any]", "PIL.Image.Image", str, "os.PathLike[str]"]
"""An image: (3, H, W), an array (H, W, 3), a gray one of either, a Pillow image or the path of a file."""

PixelMap = Union[torch.Tensor, "np.ndarray[Any, Any]", str, "os.PathLike[str]"]
"""(H, W) of an image's pixels, or the path of a .npy file."""

Mode = Literal["bilinear", "bicubic", "area", "nearest", "nearest-exact"]
"""An interpolation of :func:`murf_fast.resize`, and of all ops that resize."""

SmoothMode = Literal["bilinear", "bicubic"]
"""An interpolation of ops that resize within another formula."""

Padding = Literal["reflect", "replicate", "constant"]
"""What lies beyond a map's border for :func:`murf_fast.adaptive_conv`."""

Border = Literal["symmetric", "reflect"]
"""What lies beyond a map's border for :func:`murf_fast.gaussian_blur`."""

Backend = Literal["reference", "native", "triton"]
"""What computes a call."""

Layout = Literal["cyx", "yxc"]
"""The order of a patch's entries: channels outermost, or innermost."""

PositionFlavor = Literal["dinov2-hub", "dinov2-hf", "dinov2-reg", "clip", "open-clip", "siglip", "siglip2", "timm"]
"""Whose way of resizing position embeddings, see :func:`murf_fast.resample_pos_embed`."""

Keep = bool | Literal["checked"]
"""Whether resized position embeddings are kept, see :func:`murf_fast.resample_pos_embed`."""

Values = Literal["mean", "split"]
"""How the heads of :func:`murf_fast.window_attention` use the values."""

Norm = Literal["softmax", "linear"]
"""What makes a distribution of logits, see :func:`murf_fast.upsample_expectation`."""

Reduce = Literal["softmax", "argmax"]
"""What becomes of a prediction's logits."""

Remainder = Literal["raise", "drop"]
"""What happens to pixels that fill no patch."""

Rounding = Literal["floor", "murf"]
"""How a scale becomes a resolution."""

Attention = Literal["sdpa", "varlen", "xformers"]
"""What attends in a packed pass, see :class:`murf_fast.nn.MultiResolutionEncoder`."""

HeadGrid = Literal["largest", "first", "image"]
"""The grid on which a head takes its maps together."""

SharpInput = Literal["bilinear", "jbu", "tiles"]
"""A map that :class:`murf_fast.nn.FeatSharpUpsampler` takes."""

Distance = Literal["l2", "l2sq", "cosine"]
"""What is small between near rows."""

Metric = Literal["l2", "l2sq", "cosine", "ip"]
"""A distance, or the inner product, of :func:`murf_fast.nearest_distance`."""

Precision = Literal["auto", "float32", "bfloat16", "float16"]
"""What a bank of rows is kept in for the first look at it."""

Projection = Literal["sparse", "linear"]
"""A random projection of rows before a coreset of them is chosen."""

AnomalyMethod = Literal["mrf-ad", "patchcore", "anomaly-dino", "superad"]
"""An entry of :data:`murf_fast.anomaly.METHODS`."""

AnomalyRules = Literal["mrf-ad", "mrf-max", "patchcore", "anomaly-dino", "superad"]
"""An entry of :data:`murf_fast.anomaly.PRESETS`."""

BankIndex = Literal["exact", "cells", "coreset", "ivf"]
"""What a detector's banks are searched by."""

SubsetKind = Literal["none", "scales", "layers", "scales-x-layers", "all"]
"""Which subsets of a detector's layers and scales, see :func:`murf_fast.anomaly.subsets_of`."""

Tiling = Literal["disjoint", "half_overlap", "whole"]
"""How an enlarged image is cut, see :func:`murf_fast.nn.multi_scale_target`."""

TileFusion = Literal["average", "concat", "unshuffle"]
"""How resolutions become one target, see :func:`murf_fast.nn.multi_scale_target`."""
