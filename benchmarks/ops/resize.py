"""A position embedding resized."""

from __future__ import annotations

import torch
from inputs import CL, randn, up
from registry import Contenders, case, classes, configurations, side, smallest
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


@configurations("resize")
def shapes(device: str, dtype: torch.dtype) -> None:
    """Unrolled taps come with the other operations; these are loops of a few taps, and of many."""
    for height, width in ((9, 9), (3, 200), (200, 3)):
        x = torch.zeros(1, 768, height, width, device=device, dtype=dtype).contiguous(memory_format=CL)
        murf_fast.resize(x, (1, 1), mode="area")
