"""Depth from low-resolution bins."""

from __future__ import annotations

import torch
from inputs import CL, compiled, randn, up
from registry import Contenders, case, classes, configurations, side, smallest
from tiny import backward, class_maps, differentiated

import murf_fast


@case("upsample_expectation", "256 bins, 44 x 58 -> 176 x 232")
def expectation(device, dtype):
    logits = randn(device, dtype, 1, classes(256), side(44), side(58), memory_format=CL)
    planar, size = logits.contiguous(), (side(176), side(232))
    values = torch.linspace(0.001, 10, logits.shape[1], device=device, dtype=dtype)

    def plain(x):
        return (up(x, size).softmax(1) * values.view(1, -1, 1, 1)).sum(1)

    def oracle():
        yield (), (up(logits.double(), size).softmax(1) * values.double().view(1, -1, 1, 1)).sum(1)

    return Contenders(
        lambda: murf_fast.upsample_expectation([logits], size, values),
        {
            "eager channels_last": lambda: plain(logits),
            "eager contiguous": lambda: plain(planar),
            "compile": compiled(plain, planar),
        },
        oracle,
        logits.shape[1] * size[0] * size[1] * logits.element_size(),
    )


@smallest("upsample_expectation")
def tiny(device: str) -> None:
    differentiated(device, lambda m: murf_fast.upsample_expectation(m, (7, 9), torch.linspace(0, 1, 19, device=device)))


@configurations("upsample_expectation")
def shapes(device: str, dtype: torch.dtype) -> None:
    for i, (maps, options) in enumerate(class_maps(device, dtype)):
        values = torch.ones(maps[0].shape[1], device=device, requires_grad=True)
        for norm in ("softmax", "linear")[: 1 if i else 2]:
            murf_fast.upsample_expectation([m.detach() for m in maps], values=values.detach(), norm=norm, **options)
            backward(murf_fast.upsample_expectation(maps, values=values, norm=norm, **options))
