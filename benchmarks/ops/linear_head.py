"""A 1x1 convolution over three maps, to logits of the image's size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from inputs import compiled, feature_maps, randn, up
from registry import Contenders, Target, case, classes, side, smallest
from tiny import differentiated

import murf_fast


@case(
    "linear_head",
    "3 x 768 channels, 150 classes -> 512",
    targets=(Target("MuRF", 2.5),),
    memory_target=(1.1, "logits"),
)
def head_of_murf(device, dtype):
    return linear_head(device, dtype, {"MuRF channels_last", "MuRF contiguous", "MuRF compile"})


# By itself: it takes gigabytes and gives them back, and whoever runs next to it pays for fresh pages.
@case("linear_head", "the same", targets=(Target("full resolution", 50.0),))
def head_at_full_resolution(device, dtype):
    return linear_head(device, dtype, {"full resolution channels_last", "full resolution contiguous"})


def linear_head(device, dtype, contenders: set[str]) -> Contenders:
    maps = feature_maps(device, dtype, 768)
    planar = [m.contiguous() for m in maps]
    k, columns = classes(150), sum(m.shape[1] for m in maps)
    weight, bias = randn(device, dtype, k, columns) / columns**0.5, randn(device, dtype, k)
    size, largest = (side(512), side(512)), tuple(maps[-1].shape[2:])
    kernel = weight[:, :, None, None]

    def at(grid, *maps):
        return F.conv2d(torch.cat([up(m, grid) for m in maps], dim=1), kernel, bias)

    def murf(*maps):
        return up(at(largest, *maps), size)

    def oracle():
        double = [m.double() for m in maps]
        cat = torch.cat([up(m, largest) for m in double], dim=1)
        yield (), up(F.conv2d(cat, kernel.double(), bias.double()), size)

    others = {
        "MuRF channels_last": lambda: murf(*maps),
        "MuRF contiguous": lambda: murf(*planar),
        "MuRF compile": compiled(murf, *planar),
        "full resolution channels_last": lambda: at(size, *maps),
        "full resolution contiguous": lambda: at(size, *planar),
    }
    return Contenders(
        lambda: murf_fast.linear_head(maps, weight, bias, size=size, via=largest),
        {name: function for name, function in others.items() if name in contenders},
        oracle,
        k * size[0] * size[1] * maps[0].element_size(),
        operations=2 * k * sum(m.numel() for m in maps),
    )


@smallest("linear_head")
def tiny(device: str) -> None:
    differentiated(device, lambda m: murf_fast.linear_head(m, torch.randn(4, 38, device=device), size=(7, 9)))
