"""The loss of low-resolution logits against labels, and its gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from inputs import CL, randn, up
from registry import Contenders, Target, case, classes, configurations, side, smallest
from tiny import backward, class_maps, differentiated
from torch import Tensor

import murf_fast


@case(
    "upsample_cross_entropy",
    "150 classes, 56 -> 512, forward and backward",
    targets=(Target("eager", 4.0),),
    memory_target=(0.15, "logits"),
    capturable=False,
)
def cross_entropy(device, dtype):
    logits = randn(device, dtype, 1, classes(150), side(56), side(56), memory_format=CL).requires_grad_()
    planar, size = logits.detach().contiguous().requires_grad_(), (side(512), side(512))
    target = torch.randint(0, logits.shape[1], (1, *size), generator=torch.Generator().manual_seed(0)).to(device)

    def gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.autograd.grad(loss(x), x)[0]

    def plain(x):
        return F.cross_entropy(up(x, size), target)

    def oracle():
        yield (), gradient(plain, logits.detach().double().requires_grad_())

    graph = torch.compile(plain, fullgraph=True)
    return Contenders(
        lambda: gradient(lambda x: murf_fast.upsample_cross_entropy([x], target), logits),
        {
            "eager channels_last": lambda: gradient(plain, logits),
            "eager contiguous": lambda: gradient(plain, planar),
            "compile": lambda: gradient(graph, planar),
        },
        oracle,
        logits.shape[1] * size[0] * size[1] * logits.element_size(),
    )


@smallest("upsample_cross_entropy")
def tiny(device: str) -> None:
    target = torch.tensor([[[0, 18, -100, 7, 3], [5, 5, 5, 1, 2], [9, 9, 0, 0, 0]]], device=device)
    differentiated(device, lambda m: murf_fast.upsample_cross_entropy(m, target))


@configurations("upsample_cross_entropy")
def shapes(device: str, dtype: torch.dtype) -> None:
    for i, (maps, options) in enumerate(class_maps(device, dtype)):
        target = torch.zeros(1, *options.pop("size"), dtype=torch.int64, device=device)
        weight = torch.ones(maps[0].shape[1], device=device)
        for more in ({"weight": weight, "label_smoothing": 0.1}, {})[: 1 if i else 2]:
            backward(murf_fast.upsample_cross_entropy(maps, target, **options, **more))
