"""Calls of extreme shapes, for what they make of a kernel's arguments: an integer that is 1 is a constant to Triton."""

from __future__ import annotations

from collections.abc import Callable

import torch
from every_op import OPS, Op
from torch import Tensor

import murf_fast as mf
from murf_fast.ops._pixel_linear import pixel_linear


def ones(*shape: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.ones(shape).contiguous(memory_format=layout).requires_grad_()


def backward(result: Tensor) -> None:
    result.sum().backward()


def resized(channels: int, sides: tuple[int, ...], size: tuple[int, int]) -> Callable[[], None]:
    def call() -> None:
        maps = [ones(1, channels, n, n) for n in sides]
        backward(mf.upsample_sum(maps, size, bias=torch.ones(channels)))
        backward(mf.upsample_concat(maps, size))
        backward(mf.upsample_mean(maps, size))
        backward(mf.resize(maps[0], (1, 1)))

    return call


def classes(channels: int, side: int, size: tuple[int, int]) -> Callable[[], None]:
    def call() -> None:
        maps, target, weight = [ones(1, channels, side, side)], torch.zeros(1, *size, dtype=torch.int64), ones(channels)
        mf.upsample_argmax([m.detach() for m in maps], size)
        mf.upsample_confusion([m.detach() for m in maps], target)
        for options in ({}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "weight": weight.detach()}):
            backward(mf.upsample_cross_entropy(maps, target, **options))
        for norm in ("softmax", "linear"):
            backward(mf.upsample_expectation(maps, size, ones(channels), norm=norm))

    return call


def unified(channels: int, filters: int, kernel: int, grid: tuple[int, int]) -> Callable[[], None]:
    def call() -> None:
        for variant in ("released", "paper"):
            backward(mf.feature_unify(ones(1, channels, *grid), ones(filters, 1, kernel, kernel), variant))

    return call


def attended(channels: int, heads: int, grid: tuple[int, int], keys: tuple[int, int]) -> Callable[[], None]:
    def call() -> None:
        for values in ("mean", "split"):
            q, k, v = ones(1, channels, *grid), ones(1, channels, *keys), ones(1, channels, *keys)
            bias = tuple(ones(heads, n, m) for n, m in zip(grid, keys, strict=True))
            options = {"windows": mf.windows.full(), "num_heads": heads, "values": values}
            backward(mf.window_attention(q, k, v, bias=bias, **options))
            backward(mf.window_attention(q, k, v.detach(), **options))
            out, lse = mf.window_attention(q.detach(), k.detach(), v, return_lse=True, **options)
            backward(out + lse.sum())

    return call


def neighbours(size: int, heads: int, channels: int) -> Callable[[], None]:
    def call() -> None:
        q, k, v = (ones(1, size, size, heads, channels) for _ in range(3))
        backward(mf.neighborhood_attention(q, k, v, kernel_size=1))

    return call


def convolved(channels: int, grid: tuple[int, int], size: tuple[int, int], taps: int) -> Callable[[], None]:
    return lambda: backward(mf.adaptive_conv(ones(1, channels, *grid), ones(1, taps, *size)))


def bilateral(keys: int, channels: int, size: tuple[int, int]) -> Callable[[], None]:
    def call() -> None:
        shapes = {"range_weight0": (keys, 1), "range_bias0": (keys,), "range_weight1": (keys, keys)}
        shapes |= {"range_bias1": (keys,), "fixup_weight0": (9, 10), "fixup_bias0": (9,), "fixup_weight1": (9, 9)}
        tensors = {name: ones(*shape) for name, shape in (shapes | {"fixup_bias1": (9,)}).items()}
        params = mf.BilateralParams(range_temp=torch.tensor(0.3), sigma_spatial=torch.tensor(0.7), **tensors)
        guidance = ones(1, 1, *size)
        backward(mf.bilateral_kernels(guidance, params=params, radius=1))
        backward(mf.joint_bilateral_upsample(ones(1, channels, 1, 1), guidance, params=params, radius=1))
        with torch.no_grad():
            mf.joint_bilateral_upsample(ones(1, channels, 1, 1), guidance, params=params, radius=1)

    return call


def gaussians(channels: int, guides: int, grid: tuple[int, int], size: tuple[int, int]) -> Callable[[], None]:
    def call() -> None:
        for reach in (None, 1.0):
            maps = [ones(1, 1, *grid) for _ in range(4)]
            features, guidance = ones(1, channels, *grid), ones(1, guides, *size)
            backward(mf.gaussian_bilateral_upsample(features, guidance, *maps, radius=1, reach=reach))
            backward(mf.gaussian_bilateral_upsample(features, guidance.detach(), *[m.detach() for m in maps], radius=1))

    return call


def patches(patch: int, size: tuple[int, int]) -> Callable[[], None]:
    return lambda: mf.image_to_patches(torch.ones(1, 3, 1, 1), [size], patch)


def pixels(count: int, inputs: int, channels: int) -> Callable[[], None]:
    def call() -> None:
        weight, out = torch.ones(inputs, channels), torch.empty(count, channels)
        options = {"unit_eps": 1e-6, "bias": torch.ones(channels), "statistics": True, "backend": "triton"}
        pixel_linear(torch.ones(count, inputs), out, weight=weight, **options)

    return call


def everything(op: Op) -> None:
    """On a map of 3 x 4, in half precision: with the benchmarks' configurations, all dtypes."""
    tensors = {n: t.half() if t.is_floating_point() else t for n, t in op.tensors(3, 1).items()}
    names = op.variables(tensors) if op.differentiable else []
    result = op.call(tensors | {name: tensors[name].requires_grad_() for name in names})
    if names:
        backward(result)


CALLS = {
    **{f"{op}: float16, batch 1": lambda op=op: everything(op) for op in OPS},
    "one channel": resized(1, (1,), (1, 1)),
    "one channel, growing": resized(1, (2, 1), (3, 1)),
    "one row": resized(3, (2,), (1, 5)),
    "one class of one pixel": classes(1, 1, (1, 1)),
    "one class": classes(1, 2, (3, 5)),
    "two classes of one pixel": classes(2, 1, (1, 1)),
    "one channel, one filter": unified(1, 1, 1, (1, 1)),
    "one channel, filters": unified(1, 4, 3, (2, 3)),
    "one filter": unified(5, 1, 3, (1, 3)),
    "as many channels as filters": unified(4, 4, 3, (1, 2)),
    "filters of one tap that divide the channels": unified(34, 17, 1, (2, 1)),
    "filters of many taps": unified(4, 2, 7, (2, 2)),
    "filters of one pixel": unified(3, 17, 5, (1, 1)),
    "one head of one channel": attended(1, 1, (1, 1), (1, 1)),
    "one query": attended(4, 2, (1, 1), (2, 3)),
    "one key": attended(4, 1, (2, 3), (1, 1)),
    "one row of many keys": attended(1, 1, (1, 3), (1, 9)),
    "heads of one row of queries": attended(3, 3, (1, 65), (9, 1)),
    "one neighbour": neighbours(1, 1, 1),
    "one neighbour each": neighbours(3, 2, 1),
    "adaptive convolution of one pixel": convolved(1, (1, 1), (1, 1), 1),
    "adaptive convolution of one channel": convolved(1, (2, 2), (2, 3), 9),
    "one key of guidance": bilateral(1, 1, (2, 2)),
    "keys of two columns": bilateral(4, 2, (5, 2)),
    "a Gaussian of one pixel": gaussians(1, 1, (1, 1), (1, 1)),
    "Gaussians of one row": gaussians(1, 3, (1, 2), (1, 3)),
    "more Gaussians than pixels": gaussians(17, 1, (3, 2), (1, 1)),
    "patches of one pixel": patches(1, (1, 1)),
    "one patch": patches(2, (2, 2)),
    "one large patch": patches(21, (21, 21)),
    "blur of one pixel": lambda: mf.gaussian_blur(torch.ones(1, 1, 1, 1), 1.0),
    "blur of one row": lambda: mf.gaussian_blur(torch.ones(1, 1, 1, 40), 4.0),
    "one input": pixels(1, 1, 2),
    "one pixel": pixels(1, 5, 2),
    "nearest of one": lambda: mf.nearest_distance(torch.ones(1, 1), torch.ones(1, 1)),
    "nearest of one, cosine": lambda: mf.nearest_distance(torch.ones(1, 1), torch.ones(1, 1), metric="cosine"),
    "nearest in float32": lambda: mf.nearest_distance(torch.ones(1, 1), torch.ones(9, 1), precision="float32"),
    "nearest of one column": lambda: mf.nearest_distance(torch.ones(3, 1), torch.ones(5, 1), k=1),
    "center of one": lambda: mf.k_center_greedy(torch.ones(1, 1), count=1),
    "centers of one column": lambda: mf.k_center_greedy(torch.ones(5, 1), count=2),
}
