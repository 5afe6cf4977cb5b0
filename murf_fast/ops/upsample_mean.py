"""The (weighted) mean of k score maps brought to one grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from murf_fast import reference
from murf_fast.annotations import Backend, Mode, Size
from murf_fast.ops import _checks
from murf_fast.ops._library import layout_of, wants_channels_last
from murf_fast.ops._resize import place
from murf_fast.ops.upsample_sum import upsample_sum


def upsample_mean(
    maps: Sequence[Tensor],
    size: Size,
    weights: Sequence[float] | Tensor | None = None,
    *,
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: Size | None = None,
    memory_format: torch.memory_format | None = None,
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Resize every map to one grid and average them, in one write of the result.

    ``out = sum_s w_s U_s m_s / sum_s w_s``. A mean commutes with the resize of maps that share a grid, so those are
    averaged first: 15 score maps of 5 grids cost 5 resizes.

    Args:
        maps: (B, C, h_s, w_s), floating point, one batch size, channel count, device and dtype. Score maps have C = 1.
        size: (height, width) of the result in pixels; one integer means a square.
        weights: One number per map, as a sequence or a tensor (k,); None weighs all alike.
        mode, antialias, via, memory_format, out, backend: As for :func:`upsample_concat`.

    Returns:
        (B, C, height, width) in the dtype of the maps, averaged in float32 and rounded once. Differentiable, also with
        respect to a tensor of weights.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        BackendUnavailableError: ``backend`` cannot take this call.

    Memory: the result, and one low-resolution map in float32 per distinct grid; for half maps also the result in
    float32.

    Source: the fused score of MRF-AD (section 4) and MuRF's anomaly detection.
    """
    op = "upsample_mean"
    maps = _checks.maps(op, maps, same_channels=True, name="maps")
    how = _checks.resize(op, size, mode, antialias, via)
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    shares = _shares(op, weights, maps, dtype)
    if out is not None:
        given = weights if isinstance(weights, Tensor) else None
        _checks.out(op, out, (*maps[0].shape[:2], *how.size), [*maps, given])
    if _checks.backend(backend, maps[0]) == "reference":
        channels_last = wants_channels_last(op, memory_format, maps[0])
        result = reference.upsample_mean([m.to(dtype) for m in maps], how.size, shares, **how.options)
        if out is not None:
            return out.copy_(result)
        return result.to(maps[0].dtype).contiguous(memory_format=layout_of(channels_last))
    grids: list[tuple[int, int]] = []
    averaged: list[Tensor] = []
    for m, share in zip(maps, shares, strict=True):
        weighed, at = m.to(dtype) * share, place(grids, (m.shape[2], m.shape[3]))
        if at == len(averaged):
            averaged.append(weighed)
        else:
            averaged[at] = averaged[at] + weighed
    options: dict[str, Any] = {"mode": how.mode, "antialias": how.antialias, "via": how.via}
    options.update(memory_format=memory_format, backend=backend)
    if dtype == maps[0].dtype:
        return upsample_sum(averaged, how.size, out=out, **options)
    result = upsample_sum(averaged, how.size, **options)
    return result.to(maps[0].dtype) if out is None else out.copy_(result)


def _shares(
    op: str, weights: Sequence[float] | Tensor | None, maps: list[Tensor], dtype: torch.dtype
) -> list[float] | Tensor:
    """Weights that sum to one."""
    if weights is None:
        return [1.0 / len(maps)] * len(maps)
    if isinstance(weights, Tensor):
        _checks.vector(op, "weights", weights, len(maps), maps[0], what="one entry per map")
        _check_values(op, weights)
        weights = weights.to(torch.promote_types(weights.dtype, dtype))
        return (weights / weights.sum()).to(dtype)
    if not _checks.is_sequence(weights):
        raise TypeError(f"murf_fast.{op}: `weights` must be numbers or a tensor, got {weights!r}")
    weights = _checks.numbers(op, "weights", weights)
    if len(weights) != len(maps):
        raise ValueError(f"murf_fast.{op}: `weights` must have one entry per map, {len(maps)}, got {len(weights)}")
    total = float(sum(weights))
    _check_total(op, total, weights)
    return [w / total for w in weights]


def _check_values(op: str, weights: Tensor) -> None:
    """Finite, and not of sum zero; looked at on CPUs alone, since elsewhere it would stall the stream, and not within a
    transform of torch.func, under which there may be many values.
    """
    hidden = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(weights)
    if weights.device.type != "cpu" or hidden:
        return
    if not bool(weights.isfinite().all()):
        raise ValueError(f"murf_fast.{op}: `weights` must be finite, got {weights.tolist()}")
    _check_total(op, weights.to(torch.promote_types(weights.dtype, torch.float32)).sum().item(), weights.tolist())


def _check_total(op: str, total: float, weights: list[float]) -> None:
    if total == 0:
        raise ValueError(f"murf_fast.{op}: `weights` must not sum to zero, got {weights}")
    if not math.isfinite(total):
        raise ValueError(f"murf_fast.{op}: `weights` must have a finite sum, got {weights}")
