"""Confusion matrices from low-resolution logits."""

from __future__ import annotations

import torch
from inputs import CL, compiled, randn, up
from registry import Contenders, Target, case, classes, configurations, side, smallest
from tiny import class_maps, maps

import murf_fast

IGNORED = 255


@case(
    "upsample_confusion",
    "150 classes, 56 -> 1024",
    targets=(Target("eager", 8.0),),
    memory_target=(0.05, "logits"),
)
def confusion(device, dtype):
    count, size = classes(150), (side(1024), side(1024))
    logits = randn(device, dtype, 1, count, side(56), side(56), memory_format=CL)
    planar = logits.contiguous()
    # Regions, as labels are: some of them not labelled, the rest mostly of the class that the logits say.
    noisy = up(planar.float() + randn(device, torch.float32, *planar.shape) / 4, size).argmax(1)
    target = noisy.masked_fill(up(planar[:, :1].float(), size)[:, 0] > 1.5, IGNORED).to(torch.uint8)

    def counts_of(predicted):
        used = target != IGNORED
        return torch.bincount(target[used].long() * count + predicted[used], minlength=count**2).view(count, count)

    def plain(x):
        return counts_of(up(x, size).argmax(1))

    labels = compiled(lambda x: up(x, size).argmax(1), planar)

    def oracle():
        yield (), up(logits.double(), size)

    return Contenders(
        lambda: murf_fast.upsample_confusion([logits], target, ignore_index=IGNORED),
        {
            "eager channels_last": lambda: plain(logits),
            "eager contiguous": lambda: plain(planar),
            "compile": lambda: counts_of(labels()),
        },
        oracle,
        logits.shape[1] * size[0] * size[1] * logits.element_size(),
        logits=lambda: up(planar, size),
        counted=counts_of,
    )


@smallest("upsample_confusion")
def tiny(device: str) -> None:
    murf_fast.upsample_confusion(maps(device), torch.zeros(1, 7, 9, dtype=torch.int64, device=device))


@configurations("upsample_confusion")
def shapes(device: str, dtype: torch.dtype) -> None:
    for logits, options in class_maps(device, dtype):
        size = options.pop("size")
        for labels in (torch.uint8, torch.int64):
            target = torch.zeros(1, *size, dtype=labels, device=device)
            murf_fast.upsample_confusion([m.detach() for m in logits], target, **options)
