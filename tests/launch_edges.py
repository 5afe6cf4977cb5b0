"""Calls of extreme shapes, for what they make of the arguments of a kernel: an integer that is 1 is a constant."""

from __future__ import annotations

import torch
from every_op import OPS, Op
from torch import Tensor

import murf_fast as mf
from murf_fast.ops._pixel_linear import pixel_linear


def maps(channels: int, *sizes: tuple[int, int], batch: int = 1) -> list[Tensor]:
    return [torch.zeros(batch, channels, *size, requires_grad=True) for size in sizes]


def backward(result: Tensor) -> None:
    result.sum().backward()


def everything(op: Op) -> None:
    """On a map of 3 x 4, in half precision: with the benchmarks' configurations, all dtypes."""
    tensors = {n: t.half() if t.is_floating_point() else t for n, t in op.tensors(3, 1).items()}
    names = op.variables(tensors) if op.differentiable else []
    result = op.call(tensors | {name: tensors[name].requires_grad_() for name in names})
    if names:
        backward(result)


def resampled(channels: int, height: int, width: int) -> None:
    """One channel, one pixel: forward and backward of all that resizes."""
    several = maps(channels, (1, 1), (height, width))
    size = (height, width)
    for call in (mf.upsample_concat, mf.upsample_sum, mf.upsample_mean):
        backward(call(several, size))
    mf.upsample_argmax([m.detach() for m in several], size)
    backward(mf.resize(several[1], (1, 1)))


def cross_entropy(classes: int, smoothing: float, weighted: bool) -> None:
    weight = torch.ones(classes) if weighted else None
    target = torch.zeros(1, 5, 3, dtype=torch.int64)
    backward(mf.upsample_cross_entropy(maps(classes, (2, 3)), target, weight=weight, label_smoothing=smoothing))


def attention(heads: int, depth: int, channels: int, grid: tuple[int, int]) -> None:
    q, k = maps(heads * depth, grid, (1, 1))
    v = maps(channels, (1, 1))[0]
    backward(mf.window_attention(q, k, v, windows=mf.windows.full(), num_heads=heads))


def unify(channels: int, filters: int) -> None:
    for variant in ("released", "paper"):
        backward(
            mf.feature_unify(maps(channels, (1, 2))[0], torch.zeros(filters, 1, 3, 3, requires_grad=True), variant)
        )


def adaptive(channels: int) -> None:
    kernels = torch.zeros(1, 1, 3, 5, requires_grad=True)
    backward(mf.adaptive_conv(maps(channels, (2, 3))[0], kernels))


def linear(inputs: int, outputs: int) -> None:
    pixel_linear(torch.zeros(7, inputs), torch.zeros(7, outputs), weight=torch.zeros(inputs, outputs), backend="triton")


def nearest(queries: int, rows: int, width: int) -> None:
    mf.nearest_distance(torch.zeros(queries, width), torch.ones(rows, width))


EDGES = {
    **{f"{op}: float16, batch 1": lambda op=op: everything(op) for op in OPS},
    **{f"resampled: {c} channels to {h} x {w}": lambda c=c, h=h, w=w: resampled(c, h, w)
       for c, h, w in ((1, 1, 1), (17, 1, 5))},
    **{f"cross entropy: {k} classes, smoothing {s}, {'' if w else 'un'}weighted":
       lambda k=k, s=s, w=w: cross_entropy(k, s, w)
       for k, s, w in ((1, 0.0, True), (1, 0.1, False), (1, 0.1, True))},
    **{f"attention: {h} heads of {d}, {c} channels, {g} queries": lambda h=h, d=d, c=c, g=g: attention(h, d, c, g)
       for h, d, c, g in ((1, 1, 1, (1, 1)), (3, 5, 3, (1, 7)))},
    **{f"feature_unify: {c} channels, {m} filters": lambda c=c, m=m: unify(c, m) for c, m in ((1, 2), (3, 1))},
    "adaptive_conv: 1 channel, 1 tap": lambda: adaptive(1),
    **{f"pixel_linear: {i} inputs, {o} outputs": lambda i=i, o=o: linear(i, o) for i, o in ((1, 3), (3, 1), (7, 5))},
    **{f"nearest: {q} queries, {r} rows of {w}": lambda q=q, r=r, w=w: nearest(q, r, w)
       for q, r, w in ((1, 1, 1), (3, 1, 17))},
    "gaussian_blur: one pixel": lambda: mf.gaussian_blur(torch.zeros(1, 1, 1, 1), 1.0),
}  # fmt: skip
