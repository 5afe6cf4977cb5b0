"""Levels of a joint bilateral upsampler run one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast._layout import is_channels_last
from murf_fast.annotations import Size, SmoothMode
from murf_fast.nn._parts import peculiarity, unlike
from murf_fast.nn.guided.jbu_level import Drawn, JBULevel, dropout_mask, strangeness
from murf_fast.ops import _checks, joint_bilateral_upsample
from murf_fast.ops._derivatives import in_transform

# Bytes of logits that are made before they are reduced: they should stay in a CPU's cache, and fill a GPU.
_BAND_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}


def run_levels(
    what: str,
    named: Sequence[tuple[str, nn.Module]],
    factors: Sequence[Size],
    sources: Sequence[Tensor],
    guidance: Tensor,
    *,
    mode: SmoothMode,
    norm: nn.Module | None = None,
    final: nn.Sequential | None = None,
    own: bool = True,
    head: tuple[Tensor, Tensor | None] | None = None,
    labels: torch.dtype | None = None,
) -> list[Tensor]:
    """Each level brings the sources up by its factor (or by its own of rows and of columns), guided by the guidance
    averaged to its output's size.

    ``norm`` is called on the channels of the sources first. ``own``: the levels are :class:`JBULevel`.
    ``final`` is FeatUp's (Dropout2d, Conv2d) after the last level, ``s + 0.1 (W drop(s) + b)``. Levels are linear and
    treat every channel alike, so the matrix moves in front of them, where pixels are few; the bias cannot (kernels do
    not sum to one) and is added by the last level. So does a linear ``head`` of the result, (K, C) and (K,) or None.
    With ``labels`` the last level runs in bands of rows, of which only the classes of the largest logits are kept,
    (B, H, W) of that dtype. Autocast changes nothing.
    """
    levels = [level for _, level in named]
    _check(what, sources, guidance, levels)
    _check_norm(what, sources[0], norm)
    strange = passed_over(named, final)
    if own and strange is None:
        strange = next((f"`{n}` is not a JBULevel" for n, m in named if type(m).forward is not JBULevel.forward), None)
    if strange is not None:
        raise ValueError(f"murf_fast.{what}: {strange}, which would do nothing: only the weights of levels are read")
    with torch.autocast(guidance.device.type, enabled=False):
        if norm is not None:
            sources = [norm(s.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for s in sources]
        return _run(levels, factors, sources, guidance, mode, final, head, labels)


def passed_over(named: Sequence[tuple[str, nn.Module]], final: nn.Sequential | None) -> str | None:
    """What these levels have that :func:`run_levels` would not call, or None."""
    for name, level in named:
        reason = peculiarity(level)
        reason = strangeness(level, f"{name}.") if reason is None else f"`{name}` {reason}"
        if reason is not None:
            return reason
    return None if final is None else unlike("fixup_proj", final, [nn.Dropout2d, nn.Conv2d])


def _run(
    levels: Sequence[Any],
    factors: Sequence[Size],
    sources: Sequence[Tensor],
    guidance: Tensor,
    mode: SmoothMode,
    final: Any,
    head: tuple[Tensor, Tensor | None] | None,
    labels: torch.dtype | None,
) -> list[Tensor]:
    # All draws in FeatUp's order: the same seed drops the same channels.
    drawn = [Drawn.of(level, guidance) for level in levels]
    layouts = [torch.channels_last if is_channels_last(s) else torch.contiguous_format for s in sources]
    bias: Any = None
    if final is not None:
        sources = [_corrected(s, final) for s in sources]
        bias = None if final[-1].bias is None else 0.1 * final[-1].bias
    if head is not None:
        weight, offset = head
        sources = [F.conv2d(s, weight[:, :, None, None]) for s in sources]
        if bias is not None:
            of_final = weight.to(bias.dtype) @ bias
            offset = of_final if offset is None else offset + of_final
        bias = offset
    if not levels:
        return [s if bias is None else s + bias.to(s.dtype).view(1, -1, 1, 1) for s in sources]
    if not in_transform():  # which has no strides to ask for
        sources = [s.contiguous(memory_format=torch.channels_last) for s in sources]
    for i, (level, factor) in enumerate(zip(levels, factors, strict=True)):
        of_rows, of_columns = factor if isinstance(factor, tuple) else (factor, factor)
        height, width = sources[0].shape[2:]
        last = i + 1 == len(levels)
        pooled = F.adaptive_avg_pool2d(guidance, (of_rows * height, of_columns * width))
        options = {**drawn[i]._asdict(), "radius": level.radius, "mode": mode, "bias": bias if last else None}
        if last and labels is not None:
            return [_labels(s, pooled, labels, options) for s in sources]
        if not last or all(layout == layouts[0] for layout in layouts):
            layout = layouts[0] if last else torch.channels_last
            sources = joint_bilateral_upsample(sources, pooled, memory_format=layout, **options)
        else:
            sources = joint_bilateral_upsample(sources, pooled, memory_format=torch.channels_last, **options)
            sources = [s.contiguous(memory_format=layout) for s, layout in zip(sources, layouts, strict=True)]
    return list(sources)


def _labels(source: Tensor, pooled: Tensor, dtype: torch.dtype, options: dict[str, Any]) -> Tensor:
    """(B, H, W): classes of the largest results of a level."""
    batch, _, height, width = pooled.shape
    row_bytes = max(1, batch * source.shape[1] * width * source.element_size())
    # An even number: at a doubling, pairs of rows share their windows.
    rows = max(2, _BAND_BYTES[source.device.type] // row_bytes // 2 * 2)
    result = source.new_empty((batch, height, width), dtype=dtype)
    for y in range(0, height, rows):
        end = min(y + rows, height)
        band = joint_bilateral_upsample(source, pooled, rows=(y, end), **options)
        result[:, y:end] = band.argmax(1)
    return result


def _corrected(source: Tensor, final: Any) -> Tensor:
    convolution = final[-1]
    mask = dropout_mask(final, source.shape[0], source.shape[1], source.device)
    dropped = source if mask is None else source * mask[..., None, None].to(source.dtype)
    return torch.add(source, F.conv2d(dropped, convolution.weight.to(source.dtype)), alpha=0.1)


def _check(what: str, sources: Sequence[Tensor], guidance: Tensor, levels: Sequence[Any]) -> None:
    _checks.map_(what, "guidance", guidance)
    if guidance.device != sources[0].device:
        raise ValueError(
            f"murf_fast.{what}: `guidance` must be on the device of `source`, {sources[0].device}, "
            f"got {guidance.device}"
        )
    half_source = sources[0].dtype in (torch.bfloat16, torch.float16)
    if guidance.dtype != sources[0].dtype and not (half_source and guidance.dtype == torch.float32):
        raise TypeError(
            f"murf_fast.{what}: `guidance` must have the dtype of `source`, {sources[0].dtype}, or be float32 beside a "
            f"half type, got {guidance.dtype}"
        )
    guides = levels[0].range_proj[0].in_channels if levels else guidance.shape[1]
    if guidance.shape[0] != sources[0].shape[0]:
        raise ValueError(
            f"murf_fast.{what}: `guidance` must have the batch size of `source`, {sources[0].shape[0]}, "
            f"got {guidance.shape[0]}"
        )
    if guidance.shape[1] != guides:
        raise ValueError(f"murf_fast.{what}: `guidance` must have {guides} channels, got {guidance.shape[1]}")
    for i, source in enumerate(sources):
        if source.shape[2:] != sources[0].shape[2:]:
            raise ValueError(
                f"murf_fast.{what}: `source[{i}]` must have the size of `source[0]`, {tuple(sources[0].shape[2:])}, "
                f"got {tuple(source.shape[2:])}"
            )


def _check_norm(what: str, source: Tensor, norm: nn.Module | None) -> None:
    weight = getattr(norm, "weight", None)
    if weight is not None and (source.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(
            f"murf_fast.{what}: `source` must be float64 where the parameters of the norm are, {weight.dtype}, and "
            f"only there, got {source.dtype}"
        )
