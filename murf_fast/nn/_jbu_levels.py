"""Levels of a joint bilateral upsampler run one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast.nn.jbu_level import Drawn, dropout_mask
from murf_fast.ops import _checks, joint_bilateral_upsample
from murf_fast.ops._library import is_channels_last


def run_levels(
    what: str,
    levels: Sequence[nn.Module],
    factors: Sequence[int],
    sources: Sequence[Tensor],
    guidance: Tensor,
    *,
    mode: str,
    final: nn.Sequential | None = None,
) -> list[Tensor]:
    """Each level brings the sources up by its factor, guided by the guidance averaged to its output's size.

    ``final`` is FeatUp's (Dropout2d, Conv2d) after the last level, ``s + 0.1 (W drop(s) + b)``. Levels are linear and
    treat every channel alike, so the matrix moves in front of them, where pixels are few; the bias cannot (kernels do
    not sum to one) and is added by the last level.
    """
    _check(what, sources, guidance, levels)
    # All draws in FeatUp's order: the same seed drops the same channels.
    drawn = [Drawn.of(level, guidance) for level in levels]
    layouts = [torch.channels_last if is_channels_last(s) else torch.contiguous_format for s in sources]
    bias = None
    if final is not None:
        sources = [_corrected(s, final) for s in sources]
        bias = None if final[-1].bias is None else 0.1 * final[-1].bias
    if not levels:
        return [s if bias is None else s + bias.to(s.dtype).view(1, -1, 1, 1) for s in sources]
    sources = [s.contiguous(memory_format=torch.channels_last) for s in sources]
    for i, (level, factor) in enumerate(zip(levels, factors, strict=True)):
        height, width = sources[0].shape[2:]
        last = i + 1 == len(levels)
        pooled = F.adaptive_avg_pool2d(guidance, (factor * height, factor * width))
        options = {**drawn[i]._asdict(), "radius": level.radius, "mode": mode, "bias": bias if last else None}
        if not last or all(layout == layouts[0] for layout in layouts):
            layout = layouts[0] if last else torch.channels_last
            sources = joint_bilateral_upsample(sources, pooled, memory_format=layout, **options)
        else:
            sources = joint_bilateral_upsample(sources, pooled, memory_format=torch.channels_last, **options)
            sources = [s.contiguous(memory_format=layout) for s, layout in zip(sources, layouts, strict=True)]
    return sources


def _corrected(source: Tensor, final: nn.Sequential) -> Tensor:
    convolution = final[-1]
    mask = dropout_mask(final, source.shape[0], source.shape[1], source.device)
    dropped = source if mask is None else source * mask[..., None, None].to(source.dtype)
    return source + 0.1 * F.conv2d(dropped, convolution.weight.to(source.dtype))


def _check(what: str, sources: Sequence[Tensor], guidance: Tensor, levels: Sequence[nn.Module]) -> None:
    _checks.map_(what, "guidance", guidance)
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
