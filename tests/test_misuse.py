"""Every argument of every public function: values that it cannot take raise a TypeError or ValueError that names it.

And numbers of every kind: what NumPy computes is taken as Python's numbers are. The lists of arguments come from the
signatures, so that a new one needs a kind here.
"""

from __future__ import annotations

import inspect
import math
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import murf_fast
from murf_fast import windows


def nested(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        return torch.nested.nested_tensor([x, x])


def foreign(shape):
    """Tensors of this shape that no operation takes."""
    x = torch.ones(shape)
    tensors = [x.to(torch.complex64), x.to(torch.int64), x.bool(), x.to_sparse(), nested(x)]
    tensors.append(torch.quantize_per_tensor(x, 0.1, 0, torch.quint8))
    return [*tensors, x.to_mkldnn()] if 1 <= x.ndim <= 5 else tensors


NOT_A_NUMBER = (
    "3",
    b"3",
    [],
    {},
    1j,
    np.complex64(1),
    object(),
    torch.tensor(1.0),
    np.str_("3"),
    np.datetime64("2000"),
)
NO_BOOLEAN = (True, np.True_)
KINDS = {
    "map": lambda shape: [None, 3, "x", np.ones(3), torch.ones(2), *foreign(shape)],
    "maps": lambda shape: [None, 3, "x", [], [None], ["x"], [torch.ones(2)], *([x] for x in foreign(shape))],
    "tensor": lambda shape: ["x", 3, [1.0], torch.ones(*shape, 7), *foreign(shape)],
    "mask": lambda shape: ["x", 3, [1.0], torch.ones(*shape, 7), *(x for x in foreign(shape) if x.dtype != torch.bool)],
    "array": lambda shape: ["x", 3, [1.0], torch.ones(7), *foreign(shape)],
    "labels": lambda shape: [None, "x", 3, torch.ones(2).long(), *foreign(shape)[2:]],  # integers are right
    "size": lambda _: [
        *NOT_A_NUMBER, *NO_BOOLEAN, 2.5, math.nan, math.inf, 0, -1, "44", ("4", "4"), (4,), (4, 4, 4), (4, None),
        (True, 4), (4.0, 4), (4, math.nan), (0, 4), (4, -4), 2**31, (2**31, 1), (10**9, 10**9), 2**70, (1, 2**70),
        np.array([4.5, 4.5]), torch.tensor([4, 4]),
    ],
    "sizes": lambda _: [None, 3, "44", [], [0], ["4"], [True], [(4, 2.5)], [(28, 2**31)], [2**70], [None], [28, -28]],
    "integer": lambda _: [*NOT_A_NUMBER, *NO_BOOLEAN, None, 2.5, math.nan, math.inf, -(2**70), 2**70, (1, 1)],
    "pair": lambda _: [*NOT_A_NUMBER, *NO_BOOLEAN, 2.5, math.nan, math.inf, -1, 2**70, (1, 1, 1), (1, "1"), (True, 1)],
    "number": lambda _: [*NOT_A_NUMBER, *NO_BOOLEAN, math.nan, math.inf, -math.inf, np.float32("nan"), (1.0, 1.0)],
    "factors": lambda _: [
        *NOT_A_NUMBER, *NO_BOOLEAN, math.nan, math.inf, 0, -1.5, "11", ("1", "1"), (1.5, True), (1.0, 1.0, 1.0), 1e-9,
        (1.5, math.nan), (1.0, math.inf), 1e300, 10**400, np.float64("inf"),
    ],
    "numbers": lambda _: [
        *("abc", 3, object(), ["a"] * 3, [True] * 3, [math.nan] * 3, [math.inf] * 3, [1.0] * 5, [1.7e308] * 2),
    ],
    "flag": lambda _: [None, 0, 1, 1.0, "yes", [], torch.tensor(True), np.array([True, False])],
    "choice": lambda _: [3, True, "nonsense", "", ["bilinear"], np.array(["a", "b"]), torch.ones(2), {}],
    "format": lambda _: [3, "channels_last", torch.channels_last_3d],
    "integers": lambda _: [3, "1", [0], [True], ["1"], [1.5], [1, 1, 1], [2**70]],
    "indices": lambda _: [*KINDS["integer"](_), *(t for t in foreign((2,)) if t.dtype != torch.int64)],
    "other": lambda _: [3, "x", object()],
}  # fmt: skip
KIND = {
    "antialias": "flag", "backend": "choice", "basis": "map", "bias": "tensor", "border": "choice", "count": "integer",
    "class_bias": "tensor",
    "cls": "other", "dilation": "pair", "dtype": "other", "features": "maps", "fixup_mask": "mask",
    "flavor": "choice", "fraction": "number", "grid": "size", "guidance": "map", "ignore_index": "integer",
    "images": "map", "include_start": "flag", "index": "choice", "k": "map", "keep": "flag", "kernel_size": "pair",
    "kernels": "map", "label_smoothing": "number", "layout": "choice", "maps": "maps", "mean": "numbers",
    "memory_format": "format", "metric": "choice", "mode": "choice", "norm": "choice", "num_heads": "integer",
    "nearest": "tensor", "num_prefix_tokens": "integer", "out": "tensor", "padding": "choice", "params": "other",
    "patch_size": "integer",
    "pos_embed": "map", "precision": "choice", "prefix": "tensor", "progress": "other", "projection": "tensor",
    "q": "map", "query": "array", "radius": "integer", "range_mask": "mask", "reduction": "choice",
    "remainder": "choice", "return_lse": "flag", "return_values": "flag", "scale": "number", "scale_factor": "factors",
    "sigma": "number", "size": "size", "sizes": "sizes", "source": "maps", "source_grid": "size", "start": "indices",
    "std": "numbers", "stride": "pair", "target": "labels", "tiles": "integers", "v": "map", "values": "tensor",
    "variant": "choice", "via": "size", "weight": "map", "weights": "numbers", "windows": "other", "x": "map",
    "sigma_x": "tensor", "sigma_y": "tensor", "theta": "tensor", "sigma_r": "tensor", "reach": "number",
    "low_guidance": "map", "seed": "integer", "bank": "array", "cosine": "flag", "ip": "flag", "cells": "integer",
    "device": "choice", "rows": "other", "columns": "other", "ratio": "number",
}  # fmt: skip
# Where a name means something else in one function.
OWN = {
    ("nearest_distance", "k"): "integer",
    ("k_center_greedy", "features"): "array",
    ("feature_unify", "features"): "map",
    ("gaussian_bilateral_upsample", "features"): "map",
    ("upsample_cross_entropy", "weight"): "tensor",
    ("linear_head", "norm"): "other",
    ("low_resolution_logits", "norm"): "other",
    ("window_attention", "values"): "choice",
    ("window_attention", "bias"): "other",
    ("window_attention_argmax", "values"): "choice",
    ("window_attention_argmax", "bias"): "other",
    ("neighborhood_attention", "bias"): "other",
    ("resample_patch_embed", "patch_size"): "size",
    ("windows.clamped", "radius"): "pair",
    ("windows.ratio", "out"): "pair",
    ("windows.ratio", "grid"): "pair",
    ("windows.neighborhood", "out"): "pair",
    ("windows.neighborhood", "grid"): "pair",
    ("windows.ranges", "grid"): "pair",
    ("windows.tables", "grid"): "pair",
}
# Arguments that None, a word, a number or a shape of the list above is right for.
TAKES_NONE = {"count", "scale", "source_grid", "via", "size", "scale_factor", "flavor"}


def params(guides=3, keys=4, taps=9):
    shapes = [
        (),
        (),
        (keys, guides),
        (keys,),
        (keys, keys),
        (keys,),
        (taps, taps + guides),
        (taps,),
        (taps, taps),
        (taps,),
    ]
    return murf_fast.BilateralParams(*(torch.full(shape, 0.5) for shape in shapes))


def cases():
    """Arguments with which a function works, by its name."""
    x, y = torch.ones(1, 4, 6, 5), torch.ones(1, 3, 8, 8)
    tokens, images, row = torch.ones(1, 4, 5, 2, 2), torch.ones(1, 3, 28, 28), torch.ones(4)
    index = torch.zeros(4, 2, dtype=torch.int32)
    run = (torch.arange(4, dtype=torch.int32), torch.arange(1, 5, dtype=torch.int32))
    fuse = {"features": [x, x], "size": (8, 7), "bias": row}
    jbu = {
        "guidance": y,
        "params": params(),
        "radius": 1,
        "range_mask": torch.ones(1, 4),
        "fixup_mask": torch.ones(1, 9),
    }
    head = {"features": [x], "weight": torch.ones(2, 4), "bias": torch.ones(2)}
    rows = torch.arange(20.0).view(10, 2)
    return {
        "adaptive_conv": {"source": x[:, :, :4, :4], "kernels": torch.ones(1, 9, 8, 8), "bias": row, "size": (8, 8)},
        "bilateral_kernels": jbu,
        "feature_unify": {"features": x, "basis": torch.ones(2, 1, 3, 3)},
        "gaussian_bilateral_upsample": {
            "features": x, "guidance": y, "radius": 2, "reach": 1.5, "low_guidance": x[:, :3],
            **dict.fromkeys(("sigma_x", "sigma_y", "theta", "sigma_r"), x[:, :1]),
        },
        "gaussian_blur": {"x": x, "sigma": 1.0},
        "image_to_patches": {"images": images, "sizes": [28], "patch_size": 14, "mean": [0.5] * 3, "std": [0.5] * 3},
        "joint_bilateral_upsample": {"source": x, **jbu, "bias": row},
        "k_center_greedy": {"features": rows, "count": 3, "projection": torch.ones(2, 2), "seed": 1},
        "linear_head": {**head, "size": (8, 7)},
        "nearest_distance": {"query": rows, "bank": rows, "k": 2},
        "NearestIndex": {"bank": rows},
        "neighborhood_attention": {"q": tokens, "k": tokens, "v": tokens, "kernel_size": 3, "stride": 1, "dilation": 1},
        "patch_embed": {
            "images": images, "sizes": [28], "weight": torch.ones(4, 3, 14, 14), "bias": row, "patch_size": 14,
            "pos_embed": torch.ones(5, 4), "flavor": "timm", "num_prefix_tokens": 1, "prefix": torch.ones(1, 4),
            "tiles": [1], "source_grid": (2, 2),
        },
        "resample_patch_embed": {"weight": images[:, :, :14, :14], "patch_size": 7},
        "resample_pos_embed": {"pos_embed": torch.ones(9, 4), "grid": (4, 5), "flavor": "timm", "source_grid": (3, 3)},
        "resize": {"x": x, "size": (8, 7), "via": (7, 7)},
        "upsample_argmax": fuse,
        "upsample_concat": {"features": [x, x], "size": (8, 7), "via": 7},
        "upsample_confusion": {"features": [x], "target": torch.zeros(1, 8, 7).long(), "bias": row},
        "upsample_cross_entropy": {"features": [x], "target": torch.zeros(1, 8, 7).long(), "weight": row, "bias": row},
        "upsample_expectation": {**fuse, "values": row},
        "upsample_mean": {"maps": [x, x], "size": (8, 7), "weights": [1.0, 2.0]},
        "upsample_sum": fuse,
        "window_attention": {"q": x, "k": x, "v": x, "windows": windows.clamped(1), "num_heads": 2},
        "window_attention_argmax": {"q": x, "k": x, "v": x, "windows": windows.clamped(1), "num_heads": 2},
        "windows.ratio": {"out": (4, 4), "grid": (2, 2), "ratio": 0.25},
        "windows.neighborhood": {"out": 6, "grid": 6, "kernel_size": 3, "stride": 1, "dilation": 1},
        "windows.clamped": {"radius": 2},
        "windows.ranges": {"rows": run, "columns": run, "grid": 4},
        "windows.tables": {"rows": index, "columns": index, "grid": 4},
    }  # fmt: skip


def function(name):
    module, _, rest = name.partition(".")
    return getattr(windows, rest) if module == "windows" else getattr(murf_fast, name)


def arguments(name):
    return [p for p in inspect.signature(function(name)).parameters if p != "self"]


def test_every_public_function_is_here():
    # The index of faiss needs an extra; parameters and tokens are what functions take and give.
    public = {name for name in murf_fast.ops.__all__ if callable(getattr(murf_fast, name))}
    rules = {f"windows.{name}" for name in ("ratio", "neighborhood", "clamped", "ranges", "tables")}
    assert public - {"BilateralParams", "PackedTokens", "IVFIndex"} | rules == set(cases())


@pytest.mark.parametrize("name", cases())
def test_the_arguments_here_work(name):
    function(name)(**cases()[name])


def alternatives(name, argument, given):
    """The arguments beside the one under test."""
    if (name, argument) == ("resize", "scale_factor"):
        return {"x": given["x"]}
    if (name, argument) == ("k_center_greedy", "fraction"):
        return {"features": given["features"]}
    return given


def is_right(name, argument, value) -> bool:
    """Values of the lists above that an argument does take."""
    if value is None:
        parameter = inspect.signature(function(name)).parameters[argument]
        return argument in TAKES_NONE or parameter.default is None
    return argument in ("dtype", "device") and isinstance(value, int)


@pytest.mark.parametrize(("name", "argument"), [(name, a) for name in cases() for a in arguments(name)])
def test_misuse_names_the_argument(name, argument):
    given = cases()[name]
    sample = given.get(argument)
    sample = sample[0] if isinstance(sample, list) and sample and isinstance(sample[0], torch.Tensor) else sample
    shape = tuple(sample.shape) if isinstance(sample, torch.Tensor) else (1, 4, 8, 7)
    kind = OWN.get((name, argument), KIND[argument])
    values = [value for value in KINDS[kind](shape) if not is_right(name, argument, value)]
    wrong = [
        f"{argument}={value!r}: {what}"
        for value in values
        if (what := outcome(function(name), {**alternatives(name, argument, given), argument: value}))
        and f"`{argument}" not in what
    ]
    assert values
    assert not wrong, "\n".join(wrong)


def outcome(call, given) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            call(**given)
        except (TypeError, ValueError) as error:
            return str(error)
    return "no error"


INTEGERS = (np.int8, np.int64, np.uint16, np.array)
NUMBERS = (np.float16, np.float32, np.float64, np.array, Fraction, Decimal)


@pytest.mark.parametrize(("name", "argument"), [(name, a) for name, given in cases().items() for a in given])
def test_numbers_of_every_kind_are_taken(name, argument):
    """As the Python numbers of the same value; all are short enough for half precision."""
    given = cases()[name]
    value = given[argument]
    several = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(n, (int, float)) for n in several):
        return
    expected = function(name)(**given)
    for convert in INTEGERS if all(isinstance(n, int) for n in several) else NUMBERS:
        other = [convert(n) for n in several]
        forms = [other, np.array(several)] if isinstance(value, (list, tuple)) else other
        for form in forms:
            actual = function(name)(**{**given, argument: form})
            assert_equal(actual, expected)


def assert_equal(actual, expected):
    if isinstance(expected, (list, tuple)):
        for a, e in zip(actual, expected, strict=True):
            assert_equal(a, e)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, murf_fast.PackedTokens):
        assert torch.equal(actual.tokens, expected.tokens)
    else:
        assert actual == expected
