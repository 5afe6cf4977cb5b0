"""What the bilateral ops share: their parameters and the checks of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from murf_fast.ops import _checks, _contract


class BilateralParams(NamedTuple):
    """Parameters of one level of FeatUp's joint bilateral upsampler; K = 32 keys, G guides, P = D * D taps.

    1x1 convolutions may come as (out, in) or (out, in, 1, 1). Without the four fix-up parameters (all or none) the
    kernels stay normalized, as in FeatSharp.
    """

    range_temp: Tensor  # (): log of the softmax's temperature
    sigma_spatial: Tensor  # (): of the spatial Gaussian; the window's edge is at distance 1
    range_weight0: Tensor  # (K, G)
    range_bias0: Tensor  # (K,)
    range_weight1: Tensor  # (K, K)
    range_bias1: Tensor  # (K,)
    fixup_weight0: Tensor | None = None  # (P, P + G)
    fixup_bias0: Tensor | None = None  # (P,)
    fixup_weight1: Tensor | None = None  # (P, P)
    fixup_bias1: Tensor | None = None  # (P,)


FIELDS = BilateralParams._fields


def _shapes(guides: int, keys: int, radius: int) -> list[tuple[int, ...]]:
    """Of the parameters in order, 1x1 convolutions as matrices."""
    taps = (2 * radius + 1) ** 2
    of_range = [(), (), (keys, guides), (keys,), (keys, keys), (keys,)]
    return [*of_range, (taps, taps + guides), (taps,), (taps, taps), (taps,)]


def check_params(op: str, params: object, guidance: Tensor, radius: int) -> list[Tensor]:
    """The parameters that are there, with shapes that fit the guidance and the radius."""
    if not isinstance(params, BilateralParams):
        raise TypeError(f"murf_fast.{op}: `params` must be a BilateralParams, got {type(params).__name__}")
    values = dict(zip(FIELDS, params, strict=True))
    missing = [name for name, value in values.items() if value is None]
    if missing and missing != list(FIELDS[6:]):
        raise ValueError(f"murf_fast.{op}: `params` lacks {', '.join(missing)}; the fix-up is given whole or not")
    for name, value in values.items():
        if value is not None:
            _checks.tensor(op, f"params.{name}", value)
        if value is not None and value.device != guidance.device:
            raise ValueError(f"murf_fast.{op}: `params.{name}` must be on {guidance.device}, got {value.device}")
    guides = guidance.shape[1]
    shapes = _shapes(guides, params.range_bias0.numel(), radius)
    for (name, value), shape in zip(values.items(), shapes, strict=True):
        if value is not None and tuple(value.shape) not in (shape, (*shape, 1, 1) if len(shape) == 2 else shape):
            raise ValueError(
                f"murf_fast.{op}: `params.{name}` must have shape {shape} for a guidance of {guides} channels and a "
                f"radius of {radius}, got {tuple(value.shape)}"
            )
    check_reflection(op, radius, guidance.shape[2:])
    return [p for p in params if p is not None]


def check_reflection(op: str, radius: int, size) -> None:
    if min(size) <= radius:
        raise ValueError(
            f"murf_fast.{op}: reflect padding by {radius} needs at least {radius + 1} rows and columns, "
            f"got {tuple(size)}"
        )


def check_masks(op: str, params: BilateralParams, guidance: Tensor, radius: int, range_mask, fixup_mask) -> None:
    """Dropout's factors of the hidden channels of every image."""
    for name, mask, channels in (
        ("range_mask", range_mask, params.range_bias0.numel()),
        ("fixup_mask", fixup_mask, (2 * radius + 1) ** 2),
    ):
        if mask is not None and not (isinstance(mask, Tensor) and mask.dtype in (*_checks.DTYPES, torch.bool)):
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"murf_fast.{op}: `{name}` must be a floating-point or boolean tensor, got {got}")
        if mask is not None:
            _checks.dense(op, name, mask)
        if mask is not None and tuple(mask.shape) != (guidance.shape[0], channels):
            raise ValueError(
                f"murf_fast.{op}: `{name}` must have shape ({guidance.shape[0]}, {channels}), got {tuple(mask.shape)}"
            )
        if mask is not None and mask.device != guidance.device:
            raise ValueError(f"murf_fast.{op}: `{name}` must be on {guidance.device}, got {mask.device}")
    _checks.no_gradients(op, "a dropout mask", [range_mask, fixup_mask])


def require_network(op: str, guidance: Tensor, params: list[Tensor], range_mask, fixup_mask, radius: int) -> None:
    """The part of a contract that is about the networks: parameters and masks."""
    _contract.map_(op, "guidance", guidance)
    if radius < 0:
        raise ValueError(f"murf_fast.{op}: `radius` must be at least 0, got {radius}")
    check_reflection(op, radius, guidance.shape[2:])
    if len(params) not in (6, 10):
        raise ValueError(f"murf_fast.{op}: `params` must be 6 tensors, or 10 with a fix-up, got {len(params)}")
    keys, taps = params[3].numel(), (2 * radius + 1) ** 2
    for i, (x, shape) in enumerate(zip(params, _shapes(guidance.shape[1], keys, radius))):  # noqa: B905 (or six)
        _contract.tensor(op, f"params[{i}]", x.flatten(1) if x.ndim == 4 else x, guidance, shape, _checks.DTYPES)
    if keys < 1:
        raise ValueError(f"murf_fast.{op}: `params` must have at least one key")
    for name, mask, channels in (("range_mask", range_mask, keys), ("fixup_mask", fixup_mask, taps)):
        if mask is not None:
            dtypes = (*_checks.DTYPES, torch.bool)
            _contract.tensor(op, name, mask, guidance, (guidance.shape[0], channels), dtypes)
