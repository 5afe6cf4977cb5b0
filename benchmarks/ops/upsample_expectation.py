"""Depth from low-resolution bins."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from inputs import CL, compiled, randn, up
from registry import Contenders, Target, case, classes, configurations, side, smallest
from tiny import backward, class_maps, differentiated
from torch import Tensor

import murf_fast
from murf_fast import reference
from murf_fast.nn import DepthHead


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


def training(device, dtype, grids: list[tuple[int, int]], image: tuple[int, int], **options) -> Contenders:
    """The gradient of a depth head's weight: of SigLoss and gradient loss at the image's size, by way of 256 bins.

    The plain order is at its best: bins are made of the maps before they are resized. In the originals' the maps are
    resized and concatenated first. Biases keep the logits of the linear norm from 0, where gradients jump.
    """
    channels, size = classes(768), tuple(side(n) for n in image)
    maps = [randn(device, dtype, 2, channels, side(h), side(w), memory_format=CL) for h, w in grids]
    head = DepthHead(len(maps) * channels, classes(256), depth_range=(1e-3, 10), **options)
    head.classifier.weight.data = 0.3 * randn("cpu", torch.float32, *head.classifier.weight.shape) / channels**0.5
    head.classifier.bias.data.fill_(3)
    head.to(device, dtype)
    target = randn("cpu", torch.float32, len(maps[0]), *size).abs().mul(4).to(device)
    values, bias = head.values(torch.device(device)), head.classifier.bias
    last = maps[0] if head.grid == "first" else maps[-1]
    grid = tuple(head.upsample * n for n in last.shape[2:])

    def loss(logits: Tensor) -> Tensor:
        if head.norm == "softmax":
            p = logits.softmax(1)
        else:
            p = logits.relu() + 0.1
            p = p / p.sum(1, keepdim=True)
        expected = (p * values.to(p.dtype).view(1, -1, 1, 1)).sum(1, keepdim=True)
        depth, valid = up(expected, size)[:, 0], target > 0
        gradient = reference.log_gradient_loss(depth, target, valid)
        return reference.scale_invariant_log_loss(depth, target, valid) + 0.5 * gradient

    def plain(weight: Tensor, maps: list[Tensor], bias: Tensor) -> Tensor:
        parts = zip(maps, weight.split(channels, 1), strict=True)
        return loss(sum(up(F.conv2d(m, part), grid) for m, part in parts) + bias.view(1, -1, 1, 1))

    def original(weight: Tensor, maps: list[Tensor], bias: Tensor) -> Tensor:
        return loss(F.conv2d(torch.cat([up(m, grid) for m in maps], 1), weight, bias))

    def gradient(function: Callable, weight: Tensor, *arguments) -> Tensor:
        return torch.autograd.grad(function(weight, *arguments), weight)[0][:, :, 0, 0]

    def oracle():
        wide = head.classifier.weight.detach().double().requires_grad_()
        yield (), gradient(plain, wide, [m.double() for m in maps], bias.detach().double())

    graph, arguments = torch.compile(plain, fullgraph=True), (head.classifier.weight, maps, bias)
    return Contenders(
        lambda: gradient(lambda _: head.loss(maps, target), head.classifier.weight),
        {
            "eager": lambda: gradient(plain, *arguments),
            "original order": lambda: gradient(original, *arguments),
            "compile": lambda: gradient(graph, *arguments),
        },
        oracle,
        len(target) * len(values) * grid[0] * grid[1] * last.element_size(),
    )


@case(
    "upsample_expectation",
    "DepthHead.loss and its gradient, MuRF's: 256 bins on 44 x 58 -> 416 x 544, batch 2",
    targets=(Target("eager", 1.2),),
    less_memory=("eager", 0.6),
    capturable=False,
)
def murf_training(device, dtype):
    return training(device, dtype, [(14, 19), (29, 38), (44, 58)], (416, 544))


@case(
    "upsample_expectation",
    "DepthHead.loss and its gradient, DINOv2's: 256 bins, 34 x 45 -> 136 x 180 -> 480 x 640, batch 2",
    targets=(Target("eager", 4.0),),
    less_memory=("eager", 0.15),
    capturable=False,
)
def dinov2_training(device, dtype):
    return training(device, dtype, [(34, 45)], (480, 640), grid="first", upsample=4, norm="linear")


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
