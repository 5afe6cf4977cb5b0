"""A position embedding resized."""

from __future__ import annotations

from inputs import CL, randn, up
from registry import Contenders, case, classes, side, smallest
from tiny import differentiated

import murf_fast


@case("resize", "position embedding, 768 channels, 37 -> 56, bicubic")
def position_embedding(device, dtype):
    table = randn(device, dtype, 1, classes(768), side(37), side(37), memory_format=CL)
    planar, size = table.contiguous(), (side(56), side(56))

    def oracle():
        yield (), up(table.double(), size, "bicubic")

    return Contenders(
        lambda: murf_fast.resize(table, size, mode="bicubic"),
        {
            "eager channels_last": lambda: up(table, size, "bicubic"),
            "eager contiguous": lambda: up(planar, size, "bicubic"),
        },
        oracle,
        table.shape[1] * size[0] * size[1] * table.element_size(),
    )


@smallest("resize")
def tiny(device: str) -> None:
    differentiated(device, lambda m: murf_fast.resize(m[0], (7, 9), mode="bicubic"))
