"""What chains of layers on rows of pixels share: maps as pixels, norms from statistics, pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from murf_fast.ops.resize import resize
from murf_fast.tables.moments import group_norm

GROUPS, NORM_EPS = 8, 1e-5


class Half(NamedTuple):
    """Group norm, SiLU and convolution: a block has two."""

    gain: Tensor
    offset: Tensor
    weight: Tensor  # (in, out) of a 1x1 convolution
    bias: Tensor | None = None


def normalized(statistics: tuple[Tensor, Tensor], half: Half, pixels: int) -> Half:
    """The half with the gain and offset that its norm comes to for inputs of these statistics."""
    gain, offset = group_norm(*statistics, pixels, GROUPS, half.gain, half.offset, NORM_EPS)
    return half._replace(gain=gain, offset=offset)


def pixels_of(map_: Tensor) -> Tensor:
    """(H * W, C) of a map (C, H, W); a view where its rows follow each other."""
    return map_.permute(1, 2, 0).flatten(0, 1)


def pool(x: Tensor, size: Sequence[int], grid: Sequence[int], backend: str) -> Tensor:
    """Adaptive average pooling of pixels."""
    map_ = x.view(1, *size, -1).permute(0, 3, 1, 2)
    return pixels_of(resize(map_, tuple(grid), mode="area", memory_format=torch.channels_last, backend=backend)[0])
