"""Statistics of channels between two layers, in float64: see :mod:`murf_fast.tables.moments`, whose arithmetic takes
some thirty launches on a GPU, for which an encoder of twenty norms waits longer than for a layer.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.kernels.assembler import kernel

__all__ = ["group_norm"]

# Parts that are read at once, and channels of a program: 32 bytes of a row, which memory reads together anyway, and
# enough programs to read at the rate of the second-level cache.
PARTS, CHANNELS, WARPS = 512, 8, 8


@kernel
def _join_moments(parts, mean, spread, count, channels, size, last, total, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    c_inside = c < channels
    # Differences from the first part's mean: what cancels is then no more than the means differ, of 53 digits.
    first = tl.load(parts + c, mask=c_inside, other=0.0).to(tl.float64)
    sums = tl.zeros((CHANNELS,), dtype=tl.float64)
    squares = tl.zeros((CHANNELS,), dtype=tl.float64)
    for begin in tl.range(0, launch.bound(count), PARTS, num_stages=2):
        r = begin + tl.arange(0, PARTS)
        inside = (r < count)[:, None] & c_inside[None, :]
        at = parts + r.to(tl.int64)[:, None] * 2 * channels + c[None, :]
        own = tl.load(at, mask=inside, other=0.0).to(tl.float64)
        own = tl.where(inside, own - first[None, :], 0.0)
        values = tl.where(r == count - 1, last, size).to(tl.float64)[:, None]
        sums += tl.sum(values * own, axis=0)
        inner = tl.load(at + channels, mask=inside, other=0.0).to(tl.float64)
        squares += tl.sum(values * own * own + inner, axis=0)
    difference = sums / total
    tl.store(mean + c, first + difference, mask=c_inside)
    tl.store(spread + c, squares - sums * difference, mask=c_inside)


@kernel
def _group_norm(mean, spread, weight, bias, gain, offset, channels, total, eps, GROUPS: tl.constexpr,
                EACH: tl.constexpr):  # fmt: skip
    each = channels // GROUPS
    own = tl.arange(0, EACH)
    c = tl.arange(0, GROUPS)[:, None] * each + own[None, :]
    inside = (own < each)[None, :] & (c >= 0)
    of_channel = tl.load(mean + c, mask=inside, other=0.0)
    of_group = tl.sum(of_channel, axis=1) / each
    difference = of_channel - of_group[:, None]
    squares = tl.load(spread + c, mask=inside, other=0.0) / total + difference * difference
    variance = tl.sum(tl.where(inside, squares, 0.0), axis=1) / each
    gains = (1.0 / tl.sqrt(variance + eps))[:, None]
    if weight is not None:
        gains = tl.load(weight + c, mask=inside, other=0.0).to(tl.float64) * gains
    offsets = -gains * of_group[:, None]
    if bias is not None:
        offsets += tl.load(bias + c, mask=inside, other=0.0).to(tl.float64)
    tl.store(gain + c, tl.broadcast_to(gains, (GROUPS, EACH)).to(tl.float32), mask=inside)
    tl.store(offset + c, offsets.to(tl.float32), mask=inside)


def join(parts: Tensor, size: int, total: int) -> tuple[Tensor, Tensor]:
    """``parts`` (parts, 2, C) are dense, float32 or float64."""
    count, _, channels = parts.shape
    mean, spread = parts.new_empty((2, channels), dtype=torch.float64)
    last = total - (count - 1) * size
    with launch.on_device_of(parts):
        _join_moments[(launch.cdiv(channels, CHANNELS),)](
            parts, mean, spread, count, channels, size, last, total, PARTS=PARTS, CHANNELS=CHANNELS, num_warps=WARPS
        )
    return mean, spread


def group_norm(
    mean: Tensor, spread: Tensor, total: int, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    channels = len(mean)
    gain, offset = mean.new_empty((2, channels), dtype=torch.float32)
    with launch.on_device_of(mean):
        _group_norm[(1,)](
            mean,
            spread,
            weight,
            bias,
            gain,
            offset,
            channels,
            total,
            eps,
            GROUPS=groups,
            EACH=launch.power_of_two(channels // groups),
            num_warps=4,
        )
    return gain, offset
