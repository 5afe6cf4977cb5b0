"""How a map comes to another grid: one value for all ops that resize, made once per call.

The schema of an op cannot hold it; :func:`murf_fast.ops._library.register` takes it apart and puts it together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from murf_fast.annotations import Mode


class Resize(NamedTuple):
    size: Any  # (height, width); None where another argument of the op says it
    mode: Mode = "bilinear"
    antialias: bool = False
    via: tuple[int, int] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the size, as ops and references take it by keyword."""
        return {"mode": self.mode, "antialias": self.antialias, "via": self.via}


def place(grids: list[Any], grid: tuple[int, ...]) -> int:
    """Where a grid is in the list, to whose end it comes if it is new.

    By comparisons, which a compiler of dynamic sizes notes as such; to look it up by its hash would fix its size.
    """
    for i, known in enumerate(grids):
        if known == grid:
            return i
    grids.append(grid)
    return len(grids) - 1
