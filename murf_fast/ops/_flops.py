"""Floating-point operations of the ops, from their arguments: those of the definition in the cheapest order.

A multiply-add is two. Products count in full (2mnk), a 3x3 convolution as nine of them. An interpolation counts both
axes, the cheaper order of them, and of every value one multiply-add less than taps: the weights of a row sum to one.
Comparisons, exponentials and additions of maps do not count.

``torch.utils.flop_counter.FlopCounterMode`` counts by them. That module is not imported for it, which takes a tenth of
a second and Triton: whoever imports it finds the formulas there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from murf_fast.ops._library import axes_of
from murf_fast.tables.folded import folded_axis
from murf_fast.tables.resize import AxisTable, gram_axis, is_large
from murf_fast.windows import axis_window

COUNTER = "torch.utils.flop_counter"
ELEMENTWISE = "float32"  # what is no product is computed in float32, whatever the maps are in


class Call(NamedTuple):
    """An operation's arguments by name, and its result."""

    a: dict[str, Any]
    result: object


def operations_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: object) -> dict[str, float]:
    """Operations of a registered op by the dtype of their operands."""
    names = [a.name for a in getattr(torch.ops.murf_fast, name).default._schema.arguments]
    return FORMULAS[name](Call(dict(zip(names, args, strict=False)) | kwargs, result))


def dtype_of(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def on_taps(y: AxisTable, x: AxisTable, planes: int) -> int:
    """Of ``planes`` maps, resized by both tables."""

    def beyond_one(table: AxisTable) -> int:
        return int(np.count_nonzero(table.weights)) - int((table.count > 0).sum())

    rows, columns = beyond_one(y), beyond_one(x)
    y_first = rows * x.in_size + columns * y.out_size
    x_first = columns * y.in_size + rows * x.out_size
    return 2 * planes * min(y_first, x_first)


def resized(shape: torch.Size, size, a: dict[str, Any]) -> int:
    """Of a map of this shape, by the arguments of a resize."""
    via, factor = a.get("via"), a.get("scale_factor")
    axes = axes_of(
        *shape[2:],
        tuple(size),
        a["interpolation"],
        a["antialias"],
        None if via is None else tuple(via),
        None if factor is None else tuple(factor),
    )
    return on_taps(*axes, shape[0] * shape[1])


def _upsampled(c: Call) -> dict[str, float]:
    size = c.a.get("size") or (c.a["out"] if "out" in c.a else c.a["target"]).shape[-2:]
    return {ELEMENTWISE: sum(resized(f.shape, size, c.a) for f in c.a["features"])}


def _twice(formula: Callable[[Call], dict[str, float]]) -> Callable[[Call], dict[str, float]]:
    """Of a backward that makes the forward's values again, and brings gradients back by the transposed tables."""
    return lambda c: {unit: 2 * count for unit, count in formula(c).items()}


def _expectation(c: Call) -> dict[str, float]:
    features = c.a["features"][0]
    size = c.a["size"] if "size" in c.a else c.a["grad"].shape[-2:]
    maps = sum(resized(f.shape, size, c.a) for f in c.a["features"])
    return {ELEMENTWISE: maps + 2 * features.shape[0] * features.shape[1] * math.prod(size)}


def _resize(c: Call) -> dict[str, float]:
    return {ELEMENTWISE: resized(c.a["x"].shape, c.a["size"] if "size" in c.a else c.a["out"].shape[2:], c.a)}


def _resize_adjoint(c: Call) -> dict[str, float]:
    grad = c.a["grad"]
    shape = torch.Size((*grad.shape[:2], *c.a["in_size"]))
    return {ELEMENTWISE: resized(shape, grad.shape[2:], c.a)}


def _resize_gram(c: Call) -> dict[str, float]:
    x, mode = c.a["x"], c.a["interpolation"]
    large = is_large(mode, tuple(c.a["size"]))
    rows, columns = (
        gram_axis(n, m, mode, c.a["antialias"], None, large) for n, m in zip(x.shape[2:], c.a["size"], strict=True)
    )
    return {ELEMENTWISE: on_taps(rows, columns, x.shape[0] * x.shape[1])}


def _image_to_patches(c: Call) -> dict[str, float]:
    images = c.a["images"]
    batch, *rest = images.shape
    channels, height, width = rest if c.a["channels_first"] else (rest[2], *rest[:2])
    return {ELEMENTWISE: resized(torch.Size((batch, channels, height, width)), c.a["size"], c.a)}


def _blur(c: Call) -> dict[str, float]:
    taps = 2 * int(4 * c.a["sigma"] + 0.5) + 1
    return {ELEMENTWISE: 2 * 2 * taps * c.a["x"].numel()}


def _applied(shape: torch.Size, size, taps: int, mode: str | None, padding: str | None) -> int:
    """Kernels of ``taps`` x ``taps`` on a resized map: on the cells that they reach, or on its pixels if fewer."""
    cells = 1
    for n, m in zip(shape[2:], size, strict=True):
        table = folded_axis(n, m, taps, mode, padding)
        cells *= int(table.count.sum())
    return 2 * shape[0] * shape[1] * min(cells, taps * taps * math.prod(size))


def _adaptive_conv(c: Call) -> dict[str, float]:
    kernels = c.a["kernels"]
    taps = math.isqrt(kernels.shape[1])
    return {ELEMENTWISE: _applied(c.a["source"].shape, kernels.shape[2:], taps, c.a["interpolation"], c.a["padding"])}


def _adaptive_conv_backward_kernels(c: Call) -> dict[str, float]:
    source, size, taps = c.a["source"], c.a["grad"].shape[2:], math.isqrt(c.a["taps"])
    return {ELEMENTWISE: _applied(source.shape, size, taps, c.a["interpolation"], c.a["padding"])}


def _adaptive_conv_backward_source(c: Call) -> dict[str, float]:
    grad, taps = c.a["grad"], math.isqrt(c.a["kernels"].shape[1])
    shape = torch.Size((*grad.shape[:2], *c.a["in_size"]))
    return {ELEMENTWISE: _applied(shape, grad.shape[2:], taps, c.a["interpolation"], c.a["padding"])}


def _kernels_of(params: list[Tensor], pixels: int, radius: int) -> int:
    """The networks of every pixel, and its products with its neighbours' keys."""
    network = sum(p.numel() for p in params if p.ndim >= 2)
    return 2 * pixels * (network + (2 * radius + 1) ** 2 * params[3].numel())


def _bilateral_kernels(c: Call) -> dict[str, float]:
    guidance = c.a["guidance"]
    pixels = guidance.shape[0] * math.prod(guidance.shape[2:])
    return {ELEMENTWISE: _kernels_of(c.a["params"], pixels, c.a["radius"])}


def _joint_bilateral_upsample(c: Call) -> dict[str, float]:
    guidance, radius, (begin, end) = c.a["guidance"], c.a["radius"], c.a["span"]
    batch, _, height, width = guidance.shape
    kernels = _kernels_of(c.a["params"], batch * (end - begin) * width, radius)
    taps = 2 * radius + 1
    applied = sum(_applied(s.shape, (height, width), taps, c.a["interpolation"], "reflect") for s in c.a["sources"])
    return {ELEMENTWISE: kernels + applied * (end - begin) // height}


def _feature_unify(c: Call) -> dict[str, float]:
    return {dtype_of(c.a["features"]): 2 * c.a["features"].numel() * c.a["basis"].numel()}


def _feature_unify_backward(c: Call) -> dict[str, float]:
    passes = 1 + sum(c.a["wanted"])
    return {unit: passes * count for unit, count in _feature_unify(c).items()}


def _gaussian_bilateral(c: Call) -> dict[str, float]:
    """Of the largest window; of windows of their own less."""
    features, r = c.a["features"], c.a["max_radius"]
    inside = sum(i * i + j * j <= r * r for i in range(-r, r + 1) for j in range(-r, r + 1))
    cells = min(inside, math.prod(features.shape[2:]))
    batch, channels = features.shape[:2]
    return {ELEMENTWISE: 2 * batch * channels * math.prod(c.a["guidance"].shape[2:]) * cells}


def _image_network(pixels: Callable[[Call], tuple[int, int]], ends: bool) -> Callable[[Call], dict[str, float]]:
    """AnyUp's and JAFAR's encoders: 15 weights, and behind them those of the 3x3 convolution and the projection."""

    def formula(c: Call) -> dict[str, float]:
        image, parameters = c.a["image"], c.a["parameters"]
        *encoders, _, convolution, projection, _ = parameters
        matrices = [p.numel() for p in encoders if p.ndim >= 2]
        per_encoder = len(matrices) // 3
        to_image, to_keys, to_queries = (matrices[i * per_encoder :][:per_encoder] for i in range(3))
        inner, outer = pixels(c)
        # Those of the keys end with pooled pixels, of which there are next to none.
        of_inner = sum(to_image) + sum(to_keys[:-1]) + sum(to_queries[:-1])
        of_outer = to_queries[-1] + convolution.numel() + projection.numel() if ends else 0
        return {dtype_of(image): 2 * image.shape[0] * (inner * of_inner + outer * of_outer)}

    return formula


def _whole(c: Call) -> tuple[int, int]:
    return math.prod(c.a["image"].shape[2:]), c.a["region"][2] * c.a["region"][3]


def _part(c: Call) -> tuple[int, int]:
    """The image's share that the rectangle is of the output. The keys are known, and half of the layers with them."""
    height, width = c.a["size"]
    share = c.a["region"][2] * c.a["region"][3] / (height * width)
    return round(share * math.prod(c.a["image"].shape[2:])), c.a["region"][2] * c.a["region"][3]


def _image_rectangle(c: Call) -> dict[str, float]:
    parameters = c.a["parameters"]
    encoder = (len(parameters) - 4) // 3
    queries = sum(p.numel() for p in (*parameters[:encoder], *parameters[2 * encoder : -4]) if p.ndim >= 2)
    inner, outer = _part(c)
    ends = parameters[-3].numel() + parameters[-2].numel()
    return {dtype_of(c.a["image"]): 2 * c.a["image"].shape[0] * (inner * queries + outer * ends)}


def _naf_network(c: Call) -> dict[str, float]:
    image = c.a["image"]
    region = c.a.get("region")
    pixels = region[2] * region[3] if region else math.prod(image.shape[2:])
    return {dtype_of(image): 2 * image.shape[0] * pixels * sum(p.numel() for p in c.a["parameters"] if p.ndim >= 2)}


def _pairs(a: dict[str, Any]) -> int:
    """Of queries and the keys of their windows."""
    of_axes = (
        int((axis_window(a[name], out, size).multiplicity() > 0).sum())
        for name, out, size in zip(("rows", "columns"), a["q"].shape[2:], a["k"].shape[2:], strict=True)
    )
    return a["q"].shape[0] * math.prod(of_axes)


def _window_attention(c: Call) -> dict[str, float]:
    """Values are averaged over heads, or split among them: every channel is weighed once."""
    return {dtype_of(c.a["q"]): 2 * _pairs(c.a) * (c.a["q"].shape[1] + c.a["v"].shape[1])}


def _window_attention_backward(c: Call) -> dict[str, float]:
    """The weights again; of what is wanted, dQ = dS K, dK = dS^T Q and dV = P^T dO, and dP = dO V^T for the former."""
    q, k, v, *_ = c.a["wanted"]
    products = c.a["q"].shape[1] * (1 + q + k) + c.a["v"].shape[1] * (v + (q or k))
    return {dtype_of(c.a["q"]): 2 * _pairs(c.a) * products}


def _dense_attention(c: Call) -> dict[str, float]:
    q, k, v = c.a["q"], c.a["k"], c.a["v"]
    return {dtype_of(q): 2 * math.prod(q.shape[:-1]) * k.shape[1] * (q.shape[-1] + v.shape[-1])}


def _nearest(c: Call) -> dict[str, float]:
    """In the precision that candidates are found with."""
    query, bank = c.a["query"], c.a["bank"]
    copy = low_copy(c.a["index"])
    return {dtype_of(bank if copy is None else copy): 2 * len(query) * bank.numel()}


def low_copy(index: list[Tensor]) -> Tensor | None:
    """Of a prepared bank: what candidates are found with, if not with the bank itself."""
    return index[2] if index and index[2].numel() else None


def _k_center(c: Call) -> dict[str, float]:
    return {dtype_of(c.a["features"]): 2 * c.a["features"].numel() * (c.a["count"] - 1)}


FORMULAS: dict[str, Callable[[Call], dict[str, float]]] = {
    "adaptive_conv": _adaptive_conv,
    "adaptive_conv_backward_kernels": _adaptive_conv_backward_kernels,
    "adaptive_conv_backward_source": _adaptive_conv_backward_source,
    "bilateral_kernels": _bilateral_kernels,
    "bilateral_kernels_backward": _twice(_bilateral_kernels),
    "dense_attention": _dense_attention,
    "feature_unify": _feature_unify,
    "feature_unify_backward": _feature_unify_backward,
    "gaussian_bilateral_upsample": _gaussian_bilateral,
    "gaussian_bilateral_upsample_backward": _twice(_gaussian_bilateral),
    "gaussian_blur": _blur,
    "image_queries": _image_network(_whole, ends=True),
    "image_rectangle": _image_rectangle,
    "image_statistics": _image_network(lambda c: (math.prod(c.a["image"].shape[2:]), 0), ends=False),
    "image_to_patches": _image_to_patches,
    "joint_bilateral_upsample": _joint_bilateral_upsample,
    "k_center_greedy": _k_center,
    "naf_queries": _naf_network,
    "naf_rectangle": _naf_network,
    "naf_statistics": _naf_network,
    "nearest_distance": _nearest,
    "nearest_distance_cells": _nearest,
    "resize": _resize,
    "resize_adjoint": _resize_adjoint,
    "resize_gram": _resize_gram,
    "resize_out": _resize,
    "upsample_argmax": _upsampled,
    "upsample_concat": _upsampled,
    "upsample_concat_out": _upsampled,
    "upsample_confusion": _upsampled,
    "upsample_cross_entropy": _upsampled,
    "upsample_cross_entropy_backward": _twice(_upsampled),
    "upsample_expectation": _expectation,
    "upsample_expectation_backward": _twice(_expectation),
    "upsample_sum": _upsampled,
    "upsample_sum_out": _upsampled,
    "window_attention": _window_attention,
    "window_attention_argmax": _window_attention,
    "window_attention_backward": _window_attention_backward,
}


def register() -> None:
    """Adds the formulas to the counter's, now or once it is imported."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER].register_flop_formula)
    else:
        sys.meta_path.insert(0, _OnImport())


def _register(register_flop_formula: Callable[..., Any]) -> None:
    def formula_of(name: str) -> Callable[..., Any]:
        def total(*args, out_val=None, **kwargs) -> int:
            return int(sum(operations_of(name, args, kwargs, out_val).values()))

        return total

    for name in FORMULAS:
        register_flop_formula(getattr(torch.ops.murf_fast, name), get_raw=True)(formula_of(name))


class _OnImport(MetaPathFinder):
    """Finds the counter's module as everybody else does, and registers when it has run."""

    def find_spec(self, name: str, path, target=None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == COUNTER else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module) -> None:
            run(module)
            sys.meta_path.remove(self)
            _register(module.register_flop_formula)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
