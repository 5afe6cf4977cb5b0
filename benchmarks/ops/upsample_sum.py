"""Logits of three resolutions added up on one grid."""

from __future__ import annotations

from functools import reduce

import torch
from inputs import CL, compiled, feature_maps, up
from registry import Contenders, case, configurations, side, smallest
from tiny import PLANAR, SIZE, differentiated, wide_maps

import murf_fast


@case("upsample_sum", "3 maps of 150 classes (18, 37, 55) -> 512, channels_last")
def sum_logits(device, dtype):
    maps = feature_maps(device, dtype, 150)
    planar = [m.contiguous() for m in maps]
    size = (side(512), side(512))

    def plain(*maps):
        return reduce(torch.add, [up(m, size) for m in maps])

    def oracle():
        yield (), plain(*[m.double() for m in maps])

    return Contenders(
        lambda: murf_fast.upsample_sum(maps, size),
        {
            "eager channels_last": lambda: plain(*maps),
            "eager contiguous": lambda: plain(*planar),
            "compile": compiled(plain, *maps),
        },
        oracle,
        maps[0].shape[1] * size[0] * size[1] * maps[0].element_size(),
    )


@smallest("upsample_sum")
def tiny(device: str) -> None:
    differentiated(device, lambda m: murf_fast.upsample_sum(m, (7, 9)))


@configurations("upsample_sum")
def shapes(device: str, dtype: torch.dtype) -> None:
    bias = torch.zeros(768, device=device)
    for layout in (CL, PLANAR):
        murf_fast.upsample_sum(wide_maps(device, dtype, layout), SIZE, bias=bias, mode="bicubic")
        # Classes of a segmentation: pixels that begin on no vector of 16 elements.
        logits = [torch.zeros(1, 150, n, n, device=device, dtype=dtype) for n in (3, 4, 5)]
        murf_fast.upsample_sum([m.contiguous(memory_format=layout) for m in logits], SIZE)
