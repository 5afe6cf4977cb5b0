"""Labels from low-resolution logits."""

from __future__ import annotations

import torch
from inputs import CL, compiled, randn, up
from registry import Contenders, Target, case, classes, configurations, side, smallest
from tiny import class_maps, maps

import murf_fast


@case(
    "upsample_argmax",
    "150 classes, 56 -> 1024",
    targets=(Target("eager", 8.0),),
    memory_target=(0.05, "logits"),
)
def argmax(device, dtype):
    logits = randn(device, dtype, 1, classes(150), side(56), side(56), memory_format=CL)
    planar, size = logits.contiguous(), (side(1024), side(1024))

    def plain(x):
        return up(x, size).argmax(1)

    def oracle():
        yield (), up(logits.double(), size)

    return Contenders(
        lambda: murf_fast.upsample_argmax([logits], size),
        {
            "eager channels_last": lambda: plain(logits),
            "eager contiguous": lambda: plain(planar),
            "compile": compiled(plain, planar),
        },
        oracle,
        logits.shape[1] * size[0] * size[1] * logits.element_size(),
        logits=lambda: up(planar, size),
    )


@smallest("upsample_argmax")
def tiny(device: str) -> None:
    murf_fast.upsample_argmax(maps(device), (7, 9))


@configurations("upsample_argmax")
def shapes(device: str, dtype: torch.dtype) -> None:
    for logits, options in class_maps(device, dtype):
        for return_values in (False, True):
            murf_fast.upsample_argmax([m.detach() for m in logits], **options, return_values=return_values)
