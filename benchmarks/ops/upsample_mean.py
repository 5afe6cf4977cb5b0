"""Score maps of several grids averaged."""

from __future__ import annotations

from functools import reduce

import torch
from inputs import compiled, randn, up
from registry import Contenders, Target, case, side, smallest
from tiny import differentiated

import murf_fast


@case("upsample_mean", "15 score maps of 5 grids -> 1536 x 3348", targets=(Target("eager", 8.0),))
def mean(device, dtype):
    grids = ((33, 72), (44, 96), (55, 120), (66, 143), (77, 167))
    maps = [randn(device, dtype, 1, 1, side(h), side(w)) + i for h, w in grids for i in range(3)]
    size = (side(1536), side(3348))

    def plain(*maps):
        return reduce(torch.add, [up(m, size) for m in maps]) / len(maps)

    def stacked():
        return torch.stack([up(m, size) for m in maps]).mean(0)

    def oracle():
        yield (), plain(*[m.double() for m in maps])

    return Contenders(
        lambda: murf_fast.upsample_mean(maps, size),
        {"eager running sum": lambda: plain(*maps), "eager stack": stacked, "compile": compiled(plain, *maps)},
        oracle,
        size[0] * size[1] * maps[0].element_size(),
    )


@smallest("upsample_mean")
def tiny(device: str) -> None:
    differentiated(device, lambda m: murf_fast.upsample_mean(m, (7, 9)))
