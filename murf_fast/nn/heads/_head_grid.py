"""The grid on which a head concatenates its maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from murf_fast import _arguments
from murf_fast.annotations import HeadGrid

GRIDS = ("largest", "first", "image")


def check(what: str, grid: str) -> HeadGrid:
    return _arguments.choice(what, "grid", grid, GRIDS)


def head_grid(grid: str, features: Sequence[Tensor], size: Any, upsample: int = 1) -> tuple[int, int]:
    """(height, width): that of the image, or ``upsample`` times that of the first map or of the largest, per axis."""
    if grid == "image":
        return size
    maps = features[:1] if grid == "first" else features
    return upsample * max(f.shape[2] for f in maps), upsample * max(f.shape[3] for f in maps)
