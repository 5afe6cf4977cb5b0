"""Means and variances of many values from those of their parts, without the cancellation of E[x^2] - E[x]^2."""

from __future__ import annotations

import torch
from torch import Tensor


def join(parts: Tensor, size: int, total: int) -> tuple[Tensor, Tensor]:
    """Mean and summed squared differences (C,), float64, of ``total`` values from those (parts, 2, C) of their parts.

    Every part has ``size`` values, the last one what is left.
    """
    parts = parts.to(torch.float64)
    counts = torch.full((len(parts), 1), float(size), dtype=torch.float64, device=parts.device)
    counts[-1] = total - (len(parts) - 1) * size
    mean = (parts[:, 0] * counts).sum(0) / total
    spread = parts[:, 1].sum(0) + (counts * (parts[:, 0] - mean).square()).sum(0)
    return mean, spread


def group_norm(
    mean: Tensor, spread: Tensor, total: int, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(gain, offset) of a group norm, float32 (C,): ``gain x + offset``; statistics of channels as :func:`join` has.

    Without ``weight`` and ``bias`` those are 1 and 0.
    """
    by_group = mean.view(groups, -1)
    of_group = by_group.mean(1, keepdim=True)
    variance = (spread.view(groups, -1) / total + (by_group - of_group).square()).mean(1, keepdim=True)
    gain = (variance + eps).rsqrt().expand_as(by_group).flatten()
    gain = gain if weight is None else weight.double() * gain
    offset = -gain * of_group.expand_as(by_group).flatten()
    offset = offset if bias is None else bias.double() + offset
    return gain.float(), offset.float()
