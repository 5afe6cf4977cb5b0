"""What ``**options`` of the modules hold: arguments of a class or a method that they are passed on to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

import torch
from torch import Tensor

from murf_fast.annotations import (
    Attention,
    Backend,
    HeadGrid,
    Keep,
    Mode,
    Norm,
    Remainder,
    Rounding,
    Size,
    Sizes,
    Values,
)


class _LayerOptions(TypedDict, total=False):
    layers: Sequence[int] | None
    remainder: Remainder
    mean: Sequence[float] | None
    std: Sequence[float] | None
    attention: Attention | None
    attentions: bool
    keep_positions: Keep
    tokens_per_pass: int | None
    verify: bool


class LayerOptions(_LayerOptions, total=False):
    """Of :class:`MultiResolutionEncoder`, whatever its resolutions are and however images come to them."""

    norm: bool | None


class SharpOptions(_LayerOptions, total=False):
    """Of :class:`MultiResolutionEncoder` in :class:`FeatSharp`, which has a ``norm`` of its own."""

    mode: Mode
    antialias: bool


class SharpArguments(SharpOptions, total=False):
    """Of :class:`FeatSharp`, what its weights do not tell."""

    size: Size | None
    channels: int | None


class PassOptions(LayerOptions, total=False):
    """Of :class:`MultiResolutionEncoder`, whatever its resolutions are."""

    mode: Mode
    antialias: bool


class EncoderOptions(PassOptions, total=False):
    """Of :class:`MultiResolutionEncoder`, all but its model and ``sizes``."""

    scales: Sequence[float] | None
    rounding: Rounding
    tiles: Sizes | None


class FusionOptions(TypedDict, total=False):
    """Of :meth:`MuRF.features`, for the fusion."""

    mode: Mode
    antialias: bool
    via: Size | None
    memory_format: torch.memory_format | None
    out: Tensor | None
    backend: Backend | None


class GraphedOptions(TypedDict, total=False):
    """Of the methods that :meth:`MuRF.graphed` captures."""

    grid: Size | None
    size: Size | None
    mode: Mode
    antialias: bool
    via: Size | None
    memory_format: torch.memory_format | None
    backend: Backend | None


class LossOptions(TypedDict, total=False):
    """Of :func:`murf_fast.upsample_cross_entropy`, beside its maps and how they are resized."""

    ignore_index: int
    weight: Tensor | None
    label_smoothing: float
    reduction: Literal["mean", "sum", "none"]
    backend: Backend | None


class DepthOptions(TypedDict, total=False):
    """Of :class:`DepthHead`, what its weights do not tell."""

    depth_range: tuple[float, float]
    rule: Literal["midpoint", "linspace"]
    norm: Norm
    grid: HeadGrid
    upsample: int
    clamp: bool


class AnyUpOptions(TypedDict, total=False):
    """Of :class:`AnyUp`, what its weights do not tell."""

    windows: Literal["dense", "natten"]
    window_ratio: float
    num_heads: int
    values: Values
    image_range: tuple[float, float] | None
