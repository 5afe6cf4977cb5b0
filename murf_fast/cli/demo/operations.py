"""The operations that the demo runs and compares, on the maps of one photo.

Heads have seeded random weights: they do not change what an operation costs, and nothing is read from their results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import murf_fast
from murf_fast import reference
from murf_fast.cli.demo import jbu

CLASSES = 150  # ADE20K
BINS = 256  # MuRF's depth head
DEPTHS = (1e-3, 10.0)  # metres, NYU
SEED = 0
BLOCK = 64  # channels that the float64 check of the largest result takes at a time


@dataclass(frozen=True)
class Operation:
    """One row: the fast call, the same in float32 PyTorch, and the errors of such results against float64."""

    name: str
    result: str
    fast: Callable[[], object]
    reference: Callable[[], object]
    errors: Callable[[Sequence[Any]], list[float]]


def operations(maps: list[Tensor], grid: tuple[int, int], image: Tensor) -> list[Operation]:
    """The rows of the demo for maps (1, C, h_s, w_s) of ``image`` (1, 3, H, W), brought to ``grid``."""
    generator = torch.Generator().manual_seed(SEED)
    channels = [m.shape[1] for m in maps]
    head, depth_head = (
        torch.randn(k, sum(channels), generator=generator) / sum(channels) ** 0.5 for k in (CLASSES, BINS)
    )
    target = torch.randint(CLASSES, (1, *grid), generator=generator)
    logits, bins = (_low_resolution_logits(maps, weight) for weight in (head, depth_head))
    depths = torch.linspace(*DEPTHS, BINS)
    scores = [_distance_to_mean(m) for m in maps]
    rows = [
        _concat(maps, grid),
        _linear_head(maps, grid, head),
        _argmax(logits, grid),
        _expectation(bins, grid, depths),
        _cross_entropy(logits, target),
        _mean(scores, grid),
    ]
    small = jbu.smallest(maps)
    return rows if small is None else [*rows, _joint_bilateral(maps[small], image)]


def _concat(maps: list[Tensor], grid: tuple[int, int]) -> Operation:
    def errors(results: Sequence[Tensor]) -> list[float]:
        worst, begin = [0.0] * len(results), 0
        scale = max(float(m.abs().max()) for m in maps)
        for block in [block for m in maps for block in m.split(BLOCK, dim=1)]:
            exact = reference.resize(block.double(), grid)
            end = begin + block.shape[1]
            worst = [max(w, float((r[:, begin:end] - exact).abs().max())) for w, r in zip(worst, results, strict=True)]
            begin = end
        return [w / scale for w in worst]

    return Operation(
        "upsample_concat",
        f"{sum(m.shape[1] for m in maps)} channels",
        lambda: murf_fast.upsample_concat(maps, grid, memory_format=torch.channels_last),
        lambda: reference.upsample_concat(maps, grid),
        errors,
    )


def _linear_head(maps: list[Tensor], grid: tuple[int, int], weight: Tensor) -> Operation:
    def errors(results: Sequence[Tensor]) -> list[float]:
        # In float64 head and resize commute to the last digits; the reference's order would take gigabytes.
        return _relative(results, reference.upsample_sum(_low_resolution_logits(_double(maps), weight.double()), grid))

    return Operation(
        "linear_head",
        f"logits, {weight.shape[0]} classes",
        lambda: murf_fast.linear_head(maps, weight, size=grid),
        lambda: reference.linear_head(maps, weight, None, grid),
        errors,
    )


def _argmax(logits: list[Tensor], grid: tuple[int, int]) -> Operation:
    def errors(results: Sequence[Tensor]) -> list[float]:
        # How far the chosen class's logit stays below the largest one; counting labels would punish ties.
        exact = reference.upsample_sum(_double(logits), grid)
        chosen = [exact.gather(1, labels.long()[:, None])[:, 0] for labels in results]
        return [float((exact.amax(1) - c).max() / exact.abs().max()) for c in chosen]

    return Operation(
        "upsample_argmax",
        f"labels, {logits[0].shape[1]} classes",
        lambda: murf_fast.upsample_argmax(logits, grid),
        lambda: reference.upsample_argmax(logits, grid)[0],
        errors,
    )


def _expectation(bins: list[Tensor], grid: tuple[int, int], depths: Tensor) -> Operation:
    return Operation(
        "upsample_expectation",
        f"depth, {depths.numel()} bins",
        lambda: murf_fast.upsample_expectation(bins, grid, depths),
        lambda: reference.upsample_expectation(bins, grid, depths),
        lambda results: _relative(results, reference.upsample_expectation(_double(bins), grid, depths.double())),
    )


def _cross_entropy(logits: list[Tensor], target: Tensor) -> Operation:
    def forward_and_backward(loss_of: Callable[..., Any], features: Sequence[Tensor]) -> list[Tensor]:
        features = [f.detach().requires_grad_() for f in features]
        with torch.enable_grad():
            loss = loss_of(features, target)
        return [loss.detach(), *torch.autograd.grad(loss, features)]

    def errors(results: Sequence[list[Tensor]]) -> list[float]:
        exact = forward_and_backward(reference.upsample_cross_entropy, _double(logits))
        parts = [_relative(tensors, e) for *tensors, e in zip(*results, exact, strict=True)]
        return [max(errors) for errors in zip(*parts, strict=True)]

    return Operation(
        "upsample_cross_entropy",
        "loss and gradients",
        lambda: forward_and_backward(murf_fast.upsample_cross_entropy, logits),
        lambda: forward_and_backward(reference.upsample_cross_entropy, logits),
        errors,
    )


def _mean(scores: list[Tensor], grid: tuple[int, int]) -> Operation:
    return Operation(
        "upsample_mean",
        f"{len(scores)} score maps",
        lambda: murf_fast.upsample_mean(scores, grid),
        lambda: reference.upsample_mean(scores, grid),
        lambda results: _relative(results, reference.upsample_mean(_double(scores), grid)),
    )


def _joint_bilateral(feature: Tensor, image: Tensor) -> Operation:
    """The first two doublings of FeatUp's upsampler; all four would cost plain PyTorch gigabytes and half a minute."""
    stack = jbu.bundled()
    guidance = [jbu.guidance(image, feature, 2 ** (i + 1)) for i in range(2)]
    params = [jbu.params(level) for level in stack.levels[:2]]

    def plain(feature: Tensor, convert: Callable[[Tensor], Tensor]) -> Tensor:
        for g, p in zip(guidance, params, strict=True):
            feature = reference.joint_bilateral_upsample(feature, convert(g), [convert(t) for t in p])
        return feature

    def errors(results: Sequence[Tensor]) -> list[float]:
        exact = torch.cat([plain(block.double(), Tensor.double) for block in feature.split(BLOCK, dim=1)], dim=1)
        return _relative(results, exact)

    height, width = feature.shape[2:]
    return Operation(
        "joint_bilateral_upsample",
        f"{height} x {width} -> {4 * height} x {4 * width}, FeatUp",
        lambda: stack(feature, image, scale=4),
        lambda: plain(feature, Tensor.float),
        errors,
    )


def _low_resolution_logits(maps: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Every map through its columns of a 1x1 convolution, as channels_last maps."""
    shares = weight.split([m.shape[1] for m in maps], dim=1)
    return [
        torch.nn.functional.conv2d(m, share[:, :, None, None]).contiguous(memory_format=torch.channels_last)
        for m, share in zip(maps, shares, strict=True)
    ]


def _distance_to_mean(feature: Tensor) -> Tensor:
    """(1, 1, h, w): distance of every token from the mean token, a stand-in for an anomaly score."""
    return (feature - feature.mean((2, 3), keepdim=True)).norm(dim=1, keepdim=True)


def _double(maps: Sequence[Tensor]) -> list[Tensor]:
    return [m.double() for m in maps]


def _relative(results: Sequence[Tensor], exact: Tensor) -> list[float]:
    """Largest error of each result, in parts of the largest exact value."""
    scale = exact.abs().max()
    return [float((result - exact).abs().max() / scale) for result in results]
