"""The linear head of a multi-resolution model, computed at low resolution."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from murf_fast import reference
from murf_fast.annotations import Backend, Mode, Size
from murf_fast.ops import _checks
from murf_fast.ops._batch_norm import batch_statistics, running_statistics, uses_batch_statistics
from murf_fast.ops._library import layout_of, wants_channels_last
from murf_fast.ops._resize import Resize, place
from murf_fast.ops.upsample_sum import upsample_sum

Tokens = Sequence[Tensor | None]


def linear_head(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    size: Size,
    via: Size | None = None,
    norm: nn.BatchNorm2d | nn.SyncBatchNorm | None = None,
    cls: Tokens | None = None,
    mode: Mode = "bilinear",
    antialias: bool = False,
    memory_format: torch.memory_format | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """1x1 convolution over resized, concatenated maps, without resizing or concatenating them.

    ``out = V conv(norm(cat_s [U_s F_s, cls_s]))``, where ``U_s`` resizes map ``s`` to the grid ``via`` and ``V`` the
    logits from there to ``size``; without ``via``, ``U_s`` goes to ``size``. Channel and pixel mixing commute, so the
    maps go through their columns of the weight first, maps of one grid are added, and only class logits are resized:
    ``out = sum_s V U_s (W_s F_s) + b'``.

    Args:
        features: Maps (B, C_s, h_s, w_s), floating point, one batch size, device and dtype; any strides. channels_last,
            token views and planar maps are read in place.
        weight: (K, D) or (K, D, 1, 1) in the dtype of the features. Columns in list order, for every map its C_s
            channels and then its CLS channels: D = sum_s (C_s + C'_s).
        bias: (K,), any floating dtype, used in float32.
        size: (height, width) of the result in pixels; one integer means a square.
        via: The grid on which the maps are concatenated; the logits are resized from there. Both resizes are composed.
        norm: A batch norm over the D columns. In eval mode it is folded into weight and bias. In training mode the
            batch statistics are those of the resized, concatenated maps (at ``via``, or else at ``size``), computed
            from the low-resolution maps, and the running statistics are updated as torch does.
        cls: One entry per map: None, or (B, C'_s) in the dtype of the features. They are constant over the grid and
            become a bias per image.
        mode, antialias, memory_format, backend: As for :func:`upsample_concat`.

    Returns:
        (B, K, height, width) in the dtype of the features; under autocast in the autocast dtype, as ``F.linear``.
        Differentiable with respect to features, weight, bias, cls and the parameters of ``norm``.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        BackendUnavailableError: ``backend`` cannot take this call.

    Memory: the result, and K channels per low-resolution pixel. With the statistics of the batch also the
    low-resolution maps in float32, and twice the largest of them (of each of them, while their gradients are wanted).

    Source: MuRF's segmentation and depth heads, DINOv2's ``BNHead``, DINOv3's ``LinearHead``.
    """
    op = "linear_head"
    features = _checks.maps(op, features, same_channels=False)
    how = _checks.resize(op, size, mode, antialias, via)
    cls = check_head(op, features, weight, bias, norm, cls, how.via or how.size)
    dtype = _arithmetic_dtype(features[0])
    channels_last = wants_channels_last(op, memory_format, features[0])
    backend, layout = _checks.backend(backend, features[0], dtype), layout_of(channels_last)
    if backend == "reference":
        result = reference.linear_head(features, weight, bias, how.size, norm=norm, cls=cls, **how.options)
        return result.contiguous(memory_format=layout)
    to_grid = Resize(how.via or how.size, how.mode, how.antialias)
    logits, bias = _logits(features, weight, bias, to_grid, norm, cls, channels_last, dtype, backend)
    options = {"mode": how.mode, "antialias": how.antialias, "memory_format": layout, "backend": backend}
    return upsample_sum(logits, how.size, bias=bias, via=how.via, **options)


def low_resolution_logits(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: Size,
    norm: nn.BatchNorm2d | nn.SyncBatchNorm | None = None,
    cls: Tokens | None = None,
    mode: Mode = "bilinear",
    antialias: bool = False,
    backend: Backend | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """The part of :func:`linear_head` before the resize, for the fused ops that take logits at low resolution.

    Args:
        grid: Where the maps are concatenated: the ``via`` of :func:`linear_head`, or else its ``size``.
        features, weight, bias, norm, cls, mode, antialias, backend: As for :func:`linear_head`.

    Returns:
        One channels_last map (B, K, h, w) per distinct grid, and their common bias, (K,) or (B, K) in float32, or None:
        ``upsample_sum(maps, size, bias=bias, via=via)`` is the result of :func:`linear_head`.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    op = "low_resolution_logits"
    features = _checks.maps(op, features, same_channels=False)
    how = _checks.resize(op, grid, mode, antialias, name="grid")
    cls = check_head(op, features, weight, bias, norm, cls, how.size)
    dtype = _arithmetic_dtype(features[0])
    return _logits(features, weight, bias, how, norm, cls, True, dtype, _checks.backend(backend, features[0], dtype))


def _logits(
    features: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    how: Resize,
    norm: _BatchNorm | None,
    cls: Tokens,
    channels_last: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[list[Tensor], Tensor | None]:
    """Checked arguments to logits per distinct grid and a bias."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = weight.flatten(1)
    with _without_autocast(features[0].device.type):
        offset = None if bias is None else bias.to(wide)
        mean = None
        columns = [x for pair in zip(features, cls, strict=True) for x in pair if x is not None]
        # Logits are rounded to the features' dtype once per product: upsample_sum returns the dtype of its maps, so
        # float32 ones would need a float32 result and a cast, three times the memory of a half result.
        product = dtype
        if norm is not None:
            if norm.bias is not None:
                offset = _added(offset, weight.to(wide) @ norm.bias.to(wide))
            if uses_batch_statistics(norm):
                # The statistics need centred float32 maps anyway. With them in the product too, the gradients of weight
                # and norm do not cancel against a mean that the norm takes away.
                product = wide
                scale, columns = batch_statistics(norm, columns, how, wide, backend)
            else:
                scale, mean = running_statistics(norm, wide)
            weight = weight.to(wide) * scale
        grids: list[tuple[int, ...]] = []
        groups: list[list[tuple[Tensor, Tensor]]] = []
        shifts: list[Tensor | None] = []
        begin = 0
        for x in columns:
            end = begin + x.shape[1]
            if x.ndim == 4:
                at, folded = place(grids, tuple(x.shape[2:])), weight[:, begin:end].to(product)
                if at == len(groups):
                    groups.append([])
                    shifts.append(None)
                groups[at].append((x.to(product), folded))
                if mean is not None:
                    # Through the rounded weight: its rounding then scales the deviation from the mean, not the mean.
                    shifts[at] = _added(shifts[at], -(folded.to(wide) @ mean[begin:end]))
            else:
                deviation = x.to(wide) if mean is None else x.to(wide) - mean[begin:end]
                offset = _added(offset, deviation @ weight[:, begin:end].to(wide).mT)
            begin = end
        maps = []
        for grid, members, shift in zip(grids, groups, shifts, strict=True):
            total: Tensor | Any = None
            if shift is not None:
                # The mean is subtracted within the product, which then rounds what is left. The bias makes up for the
                # rounding of what was subtracted, and carries its whole gradient: in float32.
                total = shift.detach().to(product)
                offset = _added(offset, shift - total.to(wide))
            for x, folded in members:
                total = _project(x, folded, channels_last, total)
            maps.append((total.mT if channels_last else total).to(dtype).unflatten(2, grid))
    return maps, offset


def _added(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term


def _project(x: Tensor, weight: Tensor, channels_last: bool, total: Tensor | None) -> Tensor:
    """``total + W x`` as (B, h w, K), or (B, K, h w) for planar results; ``total`` is such a result, (K,) or None.

    The product reads ``x`` where it lies.
    """
    batch, channels, height, width = x.shape
    if not channels_last:
        planes, weights = x.flatten(2), weight.expand(batch, -1, -1)
        if total is None:
            return torch.bmm(weights, planes)
        return torch.baddbmm(total[:, None] if total.ndim == 1 else total, weights, planes)
    pixels = x.flatten(2).mT
    if batch == 1 or x.stride(0) == height * width * x.stride(3):
        rows = pixels.reshape(batch * height * width, channels)
        if total is None:
            product = torch.mm(rows, weight.mT)
        else:
            product = torch.addmm(total if total.ndim == 1 else total.flatten(0, 1), rows, weight.mT)
        return product.view(batch, height * width, len(weight))
    # Token views skip the CLS rows between two images, so the batch is no single matrix.
    weights = weight.mT.expand(batch, -1, -1)
    return torch.bmm(pixels, weights) if total is None else torch.baddbmm(total, pixels, weights)


def check_head(
    op: str,
    features: list[Tensor],
    weight: Any,
    bias: object,
    norm: object,
    cls: object,
    grid: Sequence[int],
) -> list[Tensor | None]:
    """Weight, bias, norm and cls against the maps; returns cls with one entry per map."""
    first = features[0]
    cls = _check_cls(op, features, cls)
    columns = [x.shape[1] for pair in zip(features, cls, strict=True) for x in pair if x is not None]
    total = sum(columns)
    _checks.tensor(op, "weight", weight)
    shape = tuple(weight.shape)
    if len(shape) not in (2, 4) or shape[2:] not in ((), (1, 1)) or shape[0] < 1:
        raise ValueError(f"murf_fast.{op}: `weight` must be (K, D) or (K, D, 1, 1), got {shape}")
    if shape[1] != total:
        raise ValueError(
            f"murf_fast.{op}: `weight` must have one column per channel of the features and cls in list order, "
            f"{' + '.join(map(str, columns))} = {total}, got {shape[1]}"
        )
    if _autocast_dtype(first) is None:
        _checks.same_device_and_dtype(op, "weight", weight, "features[0]", first)
    elif weight.device != first.device:
        raise ValueError(
            f"murf_fast.{op}: `weight` must be on the device of `features[0]`, {first.device}, got {weight.device}"
        )
    if bias is not None:
        _checks.vector(op, "bias", bias, shape[0], first, what="one entry per row of `weight`")
    if norm is not None:
        _check_norm(op, norm, total, first, grid)
    return cls


def _check_cls(op: str, features: list[Tensor], cls: object) -> list[Tensor | None]:
    if cls is None:
        return [None] * len(features)
    if isinstance(cls, Tensor):
        cls = [cls]
    if not isinstance(cls, Sequence) or len(cls) != len(features):
        raise ValueError(
            f"murf_fast.{op}: `cls` must have one entry per map, {len(features)}, got "
            f"{len(cls) if isinstance(cls, Sequence) else type(cls).__name__}"
        )
    for i, token in enumerate(cls):
        if token is None:
            continue
        if not isinstance(token, Tensor):
            raise TypeError(f"murf_fast.{op}: `cls[{i}]` must be a tensor or None, got {type(token).__name__}")
        _checks.tensor(op, f"cls[{i}]", token)
        if token.ndim != 2 or token.shape[0] != features[0].shape[0]:
            raise ValueError(
                f"murf_fast.{op}: `cls[{i}]` must have shape ({features[0].shape[0]}, channels), "
                f"got {tuple(token.shape)}"
            )
        _checks.same_device_and_dtype(op, f"cls[{i}]", token, "features[0]", features[0])
    return list(cls)


def _check_norm(op: str, norm: object, columns: int, first: Tensor, grid: Sequence[int]) -> None:
    if not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        raise TypeError(f"murf_fast.{op}: `norm` must be a BatchNorm2d or SyncBatchNorm, got {type(norm).__name__}")
    if norm.num_features != columns:
        raise ValueError(
            f"murf_fast.{op}: `norm` must have one feature per column of `weight`, {columns}, got {norm.num_features}"
        )
    for x in (norm.weight, norm.running_mean):
        if x is not None and x.device != first.device:
            raise ValueError(
                f"murf_fast.{op}: `norm` must be on the device of `features[0]`, {first.device}, got {x.device}"
            )
    if not uses_batch_statistics(norm):
        return
    values = first.shape[0] * grid[0] * grid[1]
    if values < 2:
        raise ValueError(f"murf_fast.{op}: `norm` in training mode needs more than one value per channel, got {values}")
    if isinstance(norm, nn.SyncBatchNorm) and torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        if processes > 1:
            raise ValueError(
                f"murf_fast.{op}: `norm` is a SyncBatchNorm in training mode, whose statistics over {processes} "
                "processes are not supported; use a BatchNorm2d, or eval mode"
            )


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would turn the operands of a linear layer into, or None; float64 is left alone, as by torch."""
    device = x.device.type
    if device not in ("cpu", "cuda") or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _arithmetic_dtype(x: Tensor) -> torch.dtype:
    return _autocast_dtype(x) or x.dtype


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    if device not in ("cpu", "cuda"):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
