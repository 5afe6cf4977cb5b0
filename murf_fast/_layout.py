"""How a map lies in memory."""

from __future__ import annotations

from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether a map lies channels_last in memory, by its strides; dense or not. Undecided layouts count as planar."""
    return x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()
