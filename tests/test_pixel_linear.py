"""The layers that AnyUp's encoders are chains of: every kernel against the definition in float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from suite import TRITON_DTYPES, for_triton
from util import assert_within_budget

from murf_fast.ops._pixel_linear import pixel_linear

# What a layer has, and whether it replaces its input or its residual.
LAYERS = {
    "first": ("image", "weight", "statistics"),
    "open": ("norm", "weight", "statistics"),
    "close": ("norm", "weight", "residual", "statistics", "in place of residual"),
    "turn": ("norm", "weight", "residual", "rotation", "in place of residual"),
    "turn heads": ("rotation", "heads", "in place"),
    "next": ("weight", "statistics", "in place"),
    "activate": ("norm", "in place"),
    "half": ("norm", "weight", "bias", "statistics", "beside others"),
    "pooled": ("weight", "residual"),
    "project": ("unit", "weight", "bias"),
}
# Channels; height and width: under, at and over tiles and parts, one pixel, and channels that fill no vector.
SIZES = ((128, 41, 39), (128, 1, 1), (64, 12, 8), (24, 7, 5), (40, 1, 97))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def results(parts, size, dtype, backend, device="cpu"):
    """Result and statistics; inputs are those of float32, whatever the type."""
    channels, height, width = size
    pixels = height * width
    inputs = 3 if "image" in parts else channels
    values = {
        "x": draw(3, pixels).T if inputs == 3 else draw(pixels, channels) * 3 + 5,
        "norm": (draw(inputs, seed=1) + 1, draw(inputs, seed=2)),
        "weight": draw(inputs, channels, seed=3) / inputs**0.5,
        "bias": draw(channels, seed=4) + 2,
        "residual": draw(pixels, channels, seed=5) - 3,
        "rotation": tuple(angles(n, channels) for n in (height, width)),
    }
    x = values["x"].to(device, dtype, copy=True, memory_format=torch.preserve_format)
    options = {}
    for name in values.keys() & set(parts):
        if name in ("weight", "residual"):
            options[name] = values[name].to(device, dtype)
        else:
            several = isinstance(values[name], tuple)
            options[name] = tuple(t.to(device) for t in values[name]) if several else values[name].to(device)
    options["heads"] = 4 if "heads" in parts else 1
    out = torch.empty(pixels, channels, dtype=dtype, device=device)
    if "beside others" in parts:
        out = torch.empty(pixels, 2 * channels, dtype=dtype, device=device)[:, channels:]
    if "in place" in parts:
        out = x
    if "in place of residual" in parts:
        out = options["residual"] = options["residual"].clone()
    found = pixel_linear(
        x, out, unit_eps=1e-3 if "unit" in parts else None, statistics="statistics" in parts, backend=backend, **options
    )
    return out, found


def angles(n, channels):
    a = draw(n, channels, seed=6).double()
    return torch.stack([a.cos(), a.sin()], 1).float()


def check(parts, size, dtype, backend, device="cpu"):
    oracle, exact = results(parts, size, torch.float64, "reference")
    same, _ = results(parts, size, dtype, "reference", device)
    actual, found = results(parts, size, dtype, backend, device)
    assert_within_budget(actual.cpu(), oracle, same.cpu())
    assert (found is None) == (exact is None)
    if exact is not None:
        # As exact as those of the same values in float64, but for the values' own rounding.
        same_mean, same_spread = actual.cpu().double().mean(0), exact[1]
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found[0].cpu(), same_mean, rtol=4 * eps, atol=4 * eps * float(oracle.abs().max()))
        floor = 20 * eps * len(oracle) * float(oracle.var(0, correction=0).max() + oracle.square().max() * eps)
        torch.testing.assert_close(found[1].cpu(), same_spread, rtol=20 * eps, atol=floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_native(layer, size, dtype, level_of_layers):
    check(LAYERS[layer], size, dtype, "native")


def test_float16_is_refused_by_the_kernel():
    x = draw(4, 8).half()
    with pytest.raises(ValueError, match="float32 or bfloat16, got float16"):
        pixel_linear(x, x, backend="native")


@pytest.mark.gpu_quick
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("size", for_triton(SIZES[2:], SIZES[:2]), ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_triton(layer, size, dtype, device):
    check(LAYERS[layer], size, dtype, "triton", device)


RESIDENT = {name: parts for name, parts in LAYERS.items() if "weight" in parts and name != "first"}


@pytest.fixture
def few_programs(monkeypatch, device) -> list[int | None]:
    """Three programs walk the tiles of any layer that is for them; the list says which launches were theirs."""
    layers, walked, launch = (
        importlib.import_module(f"murf_fast.kernels.{name}")
        for name in ("pixel_linear", "pixel_linear_resident", "launch")
    )
    if launch.architecture(torch.device(device)) != 90:
        pytest.skip("they walk on sm_90 alone")
    found = []

    def programs(*arguments):
        found.append(walked.resident_programs(*arguments))
        return found[-1]

    monkeypatch.setattr(walked, "LEAST_TILES", 0)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(layers, "resident_programs", programs)
    return found


@pytest.mark.gpu_quick
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("size", for_triton(((72, 12, 17), (40, 1, 97)), SIZES), ids=str)
@pytest.mark.parametrize("layer", [*RESIDENT, "next beside"])
def test_programs_that_walk_tiles(layer, size, dtype, device, few_programs):
    """Of two shares in float32, which therefore cannot be in place."""
    parts = RESIDENT.get(layer, ("weight", "statistics"))
    check(parts, size, dtype, "triton", device)
    takes = not (layer == "next" and dtype == torch.float32)
    assert len(few_programs) == 1
    assert (few_programs[0] is not None) == takes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_nothing(dtype, three_threads):
    parts, size = LAYERS["close"], (128, 61, 59)
    expected = results(parts, size, dtype, "native")
    torch.set_num_threads(1)
    actual = results(parts, size, dtype, "native")
    for a, e in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(a, e)
