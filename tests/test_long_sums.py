"""Sums of many terms keep their precision: long filters and their adjoints, at every level of the CPU kernels.

One rounding is that of the terms' absolute sum. Sums in float32, one term after the other, fail every test here.
"""

from __future__ import annotations

import pytest
import torch
from util import assert_within_budget, layouts

import murf_fast

EPS = torch.finfo(torch.float32).eps
MILLION = 10**6
AXES = {"rows": (MILLION, 1), "columns": (1, MILLION)}
LAYOUTS = ("contiguous", "channels_last", "sliced")

each_axis = pytest.mark.parametrize("shape", AXES.values(), ids=AXES)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def noise(channels: int, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.rand(1, channels, *shape, generator=torch.Generator().manual_seed(seed)) + torch.arange(channels).view(
        -1, 1, 1
    )


def assert_one_rounding(actual: torch.Tensor, oracle: torch.Tensor, size: torch.Tensor | float, times: float = 1):
    error = (actual.double() - oracle).abs()
    assert bool((error <= times * EPS * size).all()), f"off by {float((error / (EPS * size)).max()):.3g} roundings"


@each_layout
@each_axis
def test_mean(shape, layout, level):
    x = layouts(torch.cat([torch.ones(1, 1, *shape), noise(2, shape)], 1))[layout]
    oracle = x.double().mean((2, 3), keepdim=True)
    for result in (
        murf_fast.resize(x, (1, 1), mode="area"),
        murf_fast.upsample_concat([x], (1, 1), mode="area"),
        murf_fast.upsample_sum([x], (1, 1), mode="area"),
        murf_fast.upsample_mean([x, x], (1, 1), mode="area"),
    ):
        assert_one_rounding(result, oracle, oracle)
    half = x.half()
    assert_within_budget(
        murf_fast.resize(half, (1, 1), mode="area"), half.double().mean((2, 3), keepdim=True), oracle.half()
    )


@each_layout
@each_axis
def test_gradient_is_a_sum(shape, layout, level):
    grad = layouts(torch.cat([torch.ones(1, 1, *shape), noise(2, shape)], 1))[layout]
    oracle = grad.double().sum((2, 3), keepdim=True)
    for resize in (
        lambda x: murf_fast.resize(x, shape),
        lambda x: murf_fast.upsample_concat([x], shape),
        lambda x: murf_fast.upsample_sum([x], shape),
    ):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.zeros(1, 3, 1, 1).contiguous(memory_format=memory_format).requires_grad_()
            (actual,) = torch.autograd.grad(resize(x), x, grad)
            assert_one_rounding(actual, oracle, oracle)


@each_axis
def test_logits(shape, level):
    """Classes that differ by a few roundings; their means are one and a little."""
    x = 1 - 2**-17 + 2 * 2**-17 * noise(1, shape)
    x = torch.cat([x - 2**-19, x, x - 2**-20], 1)
    means = x.double().mean((2, 3))
    assert murf_fast.upsample_argmax([x], (1, 1), mode="area").item() == 1
    values = torch.tensor([1.0, 2.0, 4.0])
    expected = (means.softmax(1) * values).sum(1)
    assert_one_rounding(
        murf_fast.upsample_expectation([x], (1, 1), values, mode="area").flatten(), expected, expected, times=4
    )
    target = torch.zeros(1, 1, 1, dtype=torch.long)
    expected = torch.nn.functional.cross_entropy(means, target[:, 0, 0])
    assert_one_rounding(murf_fast.upsample_cross_entropy([x], target, mode="area"), expected, expected, times=4)


@pytest.mark.parametrize("threads", [1, 3])
def test_gradients_of_logits(threads, level):
    """A million pixels of one cell: the gradient of every one is the same, or has a random sign."""
    size = 1000
    target = torch.randint(0, 3, (1, size, size), generator=torch.Generator().manual_seed(0))
    weights = noise(1, (size, size))[0] - 0.5
    before = torch.get_num_threads()
    torch.set_num_threads(threads)

    def gradients(dtype, backend):
        x = torch.tensor([0.3, -0.2, 0.1], dtype=dtype).view(1, 3, 1, 1).requires_grad_()
        loss = murf_fast.upsample_cross_entropy([x], target, reduction="sum", backend=backend)
        values = torch.tensor([1.0, 2.0, 4.0], dtype=dtype)
        expected = murf_fast.upsample_expectation([x], (size, size), values, backend=backend)
        return torch.autograd.grad(loss, x)[0], torch.autograd.grad((expected * weights.to(dtype)).sum(), x)[0]

    try:
        for actual, oracle in zip(
            gradients(torch.float32, "native"), gradients(torch.float64, "reference"), strict=True
        ):
            # Equal logits: the roundings of a pixel's own gradient are a million times the same.
            assert_one_rounding(actual, oracle, MILLION / 4, times=4)
    finally:
        torch.set_num_threads(before)


@each_layout
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_antialiased(mode, layout, level):
    x = layouts(torch.cat([torch.ones(1, 1, 4001, 1500), noise(2, (4001, 1500))], 1))[layout]
    rule = {"mode": mode, "antialias": True}
    oracle = murf_fast.resize(x.double(), (3, 2), **rule, backend="reference")
    assert_one_rounding(murf_fast.resize(x, (3, 2), **rule), oracle, oracle, times=2)


@each_layout
def test_blur(layout, level):
    x = layouts(torch.cat([torch.ones(1, 1, 300, 700), noise(1, (300, 700))], 1))[layout]
    oracle = murf_fast.gaussian_blur(x.double(), 50.0, backend="reference")
    assert_one_rounding(murf_fast.gaussian_blur(x, 50.0), oracle, oracle, times=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_patches(dtype, level):
    x = noise(3, (3000, 2000)) / 3
    x = (255 * x).to(torch.uint8) if dtype == torch.uint8 else x
    exact = x.double() / (255 if dtype == torch.uint8 else 1)
    oracle = torch.nn.functional.interpolate(exact, (14, 14), mode="bicubic", antialias=True).flatten(1)[None]
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        (actual,) = murf_fast.image_to_patches(images, [14], 14, mode="bicubic", antialias=True)
        assert_one_rounding(actual, oracle, 1.0, times=2)
