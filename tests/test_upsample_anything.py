"""Upsample Anything: the original's kernels, a loss that falls, batches, sizes, modes of torch, bad input."""

from __future__ import annotations

import originals
import pytest
import torch
import torch.nn.functional as F
from util import assert_within_budget

import murf_fast
from murf_fast.nn import CellKernels, UpsampleAnything
from murf_fast.nn.guided import upsample_anything

NAMES = CellKernels._fields


def photo(height, width, seed=0):
    """Smooth, with an edge."""
    coarse = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    image = 0.5 * F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    image[..., width // 3 :] += 0.4
    return image


def loss_of(image, grid, kernels, **options):
    low = murf_fast.resize(image, grid, mode="bicubic")
    return float((murf_fast.gaussian_bilateral_upsample(low, image, *kernels, **options) - image).abs().mean())


def test_golden():
    """The original's first losses and its kernels after three steps; an error of a step grows in the next."""
    data = {name: torch.from_numpy(array) for name, array in originals.golden("upsample_anything").items()}
    image, grid = data["guidance"], tuple(data["features"].shape[2:])
    losses = [loss_of(image, grid, UpsampleAnything(steps=steps).fit(image, grid)) for steps in range(6)]
    torch.testing.assert_close(torch.tensor(losses), data["losses"][:6], rtol=1e-5, atol=0)
    exact = UpsampleAnything(steps=3).fit(image.double(), grid)
    for name, ours, want in zip(NAMES, UpsampleAnything(steps=3).fit(image, grid), exact, strict=True):
        theirs = data[f"fit3.{name}"]
        assert ours.dtype == torch.float32
        assert_within_budget(ours, want, theirs, name)


def test_the_loss_falls_and_the_kernels_are_used():
    image, grid = photo(28, 35), (4, 5)
    before, after = (UpsampleAnything(steps=steps).fit(image, grid) for steps in (0, 20))
    assert loss_of(image, grid, after) < 0.7 * loss_of(image, grid, before)
    assert not any(k.requires_grad for k in after)
    features = torch.randn(1, 9, *grid).requires_grad_()
    result = UpsampleAnything(steps=20)(image, features)
    assert torch.equal(result, UpsampleAnything()(image, features, after))
    assert torch.equal(result, murf_fast.gaussian_bilateral_upsample(features, image, *after))
    (gradient,) = torch.autograd.grad(result.sum(), features)
    torch.testing.assert_close(gradient.sum(), torch.tensor(9.0 * 28 * 35))


def test_every_image_of_a_batch_by_itself():
    images = torch.cat([photo(20, 24, seed) for seed in range(2)])
    model = UpsampleAnything(steps=3, radius=3)
    together = model.fit(images, (5, 4))
    for i in range(2):
        for both, own in zip(together, model.fit(images[i : i + 1], (5, 4)), strict=True):
            assert torch.equal(both[i : i + 1], own)
    assert model.fit(images[:0], (5, 4)).theta.shape == (0, 1, 5, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_sizes_and_layouts(dtype):
    """Sizes that are no multiples of the map's; the result follows the features."""
    image, features = photo(19, 23), torch.randn(1, 6, 4, 3).to(dtype).contiguous(memory_format=torch.channels_last)
    out = UpsampleAnything(steps=2, radius=2)(image, features)
    assert (out.shape, out.dtype) == ((1, 6, 19, 23), dtype)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.isfinite().all()


def test_modes_of_torch_change_nothing():
    image, features, model = photo(16, 20), torch.randn(1, 5, 4, 5), UpsampleAnything(steps=2)
    expected = model(image, features)
    with torch.no_grad():
        assert torch.equal(model(image, features), expected)
    with torch.inference_mode():
        assert torch.equal(model(image, features), expected)
        assert torch.equal(model(image.clone(), features.clone()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(image, features), expected)


def test_what_does_not_change_is_made_once(monkeypatch):
    """The shrunk image and the guidance of the cells: not at every step."""
    calls = []
    monkeypatch.setattr(upsample_anything, "resize", lambda *a, **k: calls.append(1) or murf_fast.resize(*a, **k))
    UpsampleAnything(steps=5).fit(photo(12, 12), (3, 3))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"steps": -1}, ValueError, "`steps`"),
        ({"rate": 0.0}, ValueError, "`rate` must be positive and finite, got 0.0"),
        ({"sigma": -1.0}, ValueError, "`sigma` must be positive and finite, got -1.0"),
        ({"radius": 33}, ValueError, "`radius` must be 1 to 32"),
        ({"reach": "2"}, TypeError, "`reach`"),
    ],
)
def test_bad_options(arguments, error, words):
    with pytest.raises(error) as raised:
        UpsampleAnything(**arguments)
    assert f"murf_fast.UpsampleAnything: {words}" in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.ones(3, 8, 8), torch.ones(1, 2, 4, 4)), ValueError, "`image` must be (B, C, H, W)"),
        ((torch.ones(2, 3, 8, 8), torch.ones(1, 2, 4, 4)), ValueError, "`features` must have the batch size of"),
        ((torch.ones(1, 3, 8, 8), torch.ones(1, 2, 4, 4), torch.ones(1)), TypeError, "`kernels` must be what `fit`"),
    ],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error) as raised:
        UpsampleAnything(steps=1)(*arguments)
    assert f"murf_fast.UpsampleAnything: {words}" in str(raised.value)
