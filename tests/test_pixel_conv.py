"""The 3x3 convolutions of image encoders on rows of pixels: every kernel against the definition in float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from suite import TRITON_DTYPES, for_triton
from util import assert_within_budget, nudged, worst

from murf_fast.ops._pixel_conv import pixel_conv, pixel_conv_weight

# What a layer has.
LAYERS = {
    "first": ("image", "bias", "reflect", "statistics"),
    "inner": ("norm", "bias", "reflect", "statistics"),
    "last": ("norm", "bias", "reflect", "beside others"),
    "affine": ("norm", "linear"),
    "rows": ("norm", "rows", "statistics"),
    "bare": (),
}
# Inputs and results; height and width: under, at and over tiles of 2 x 4 and runs of 30 tiles, one pixel.
SIZES = ((128, 128, 13, 125), (24, 40, 7, 5), (16, 72, 2, 2), (40, 8, 8, 120), (64, 64, 1, 1), (8, 24, 1, 9))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def results(parts, size, dtype, backend, device="cpu", nudge=None):
    """Result and statistics; inputs are those of float32, whatever the type; ``nudge``: other roundings of them."""
    inputs, channels, height, width = size
    inputs = 3 if "image" in parts else inputs
    pixels = height * width
    x = draw(3, pixels).T if "image" in parts else draw(pixels, inputs) * 3 + 5
    x = x.to(device, dtype, copy=True, memory_format=torch.preserve_format)
    rows = (height // 3, max(height // 3 + 1, height - 1)) if "rows" in parts else None
    made = height if rows is None else rows[1] - rows[0]
    options = {"rows": rows, "activate": "linear" not in parts, "reflect": "reflect" in parts}
    if "norm" in parts:
        options["norm"] = tuple(t.to(device) for t in (draw(inputs, seed=1) + 1, draw(inputs, seed=2)))
    if "bias" in parts:
        options["bias"] = (draw(channels, seed=4) + 2).to(device)
    weight = (draw(channels, inputs, 3, 3, seed=3) / (9 * inputs) ** 0.5).to(device, dtype)
    if nudge is not None:
        x, weight = (nudged(t.cpu(), nudge).to(device) for t in (x, weight))
    whole = torch.full((made * width, 2 * channels), torch.nan, dtype=dtype, device=device)
    out = whole[:, channels:] if "beside others" in parts else torch.empty_like(whole[:, :channels]).contiguous()
    found = pixel_conv(
        x, (height, width), out, weight=pixel_conv_weight(weight, backend), statistics="statistics" in parts,
        backend=backend, **options
    )  # fmt: skip
    if "beside others" in parts:
        assert whole[:, :channels].isnan().all()
    return out, found


def check(parts, size, dtype, backend, device="cpu"):
    oracle, exact = results(parts, size, torch.float64, "reference")
    # One run of few sums may be right by chance, on one processor or another.
    draws = [results(parts, size, dtype, "reference", device, nudge)[0].cpu() for nudge in (None, 0, 1, 2)]
    same = worst(draws, oracle)
    actual, found = results(parts, size, dtype, backend, device)
    if min(size[2:]) == 1:
        # Most products of a direct sum are exact zeros there, those of a tile are not: the error of whole sums.
        tile = (*size[:2], *(max(n, 3) for n in size[2:]))
        whole, rounded = (results(parts, tile, d, "reference")[0] for d in (torch.float64, dtype))
        same = oracle + (rounded.double() - whole).abs().max()
    assert_within_budget(actual.cpu(), oracle, same)
    assert (found is None) == (exact is None)
    if exact is not None:
        # As exact as those of the same values in float64, but for the values' own rounding.
        values, eps = actual.cpu().double(), torch.finfo(dtype).eps
        torch.testing.assert_close(
            found[0].cpu(), values.mean(0), rtol=4 * eps, atol=4 * eps * float(oracle.abs().max())
        )
        floor = 20 * eps * len(oracle) * float(oracle.var(0, correction=0).max() + oracle.square().max() * eps)
        torch.testing.assert_close(found[1].cpu(), exact[1], rtol=20 * eps, atol=floor)


def fits(layer, size):
    """Borders are reflected from two pixels on."""
    return "reflect" not in LAYERS[layer] or min(size[2:]) > 1


CASES = [(layer, size) for layer in LAYERS for size in SIZES if fits(layer, size)]


DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("layer", "size"), CASES, ids=str)
def test_native(layer, size, dtype, level_of_layers):
    check(LAYERS[layer], size, dtype, "native")


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("size", for_triton(SIZES[1:3], SIZES[:1]), ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_triton(layer, size, dtype, device):
    check(LAYERS[layer], size, dtype, "triton", device)


@pytest.mark.parametrize("layer", ["inner", "affine"])
def test_triton_in_bands(layer, device, monkeypatch):
    """Of eight rows, the last of fewer."""
    monkeypatch.setattr(importlib.import_module("murf_fast.kernels.pixel_conv"), "BAND_BYTES", 1)
    check(LAYERS[layer], (8, 8, 19, 3), torch.float32, "triton", device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bands_are_rows_of_the_whole(dtype):
    """Bands of an even number of rows cut no tile: bit for bit."""
    x, weight = draw(23 * 9, 16).to(dtype), pixel_conv_weight(draw(24, 16, 3, 3).to(dtype), "native")
    whole = torch.empty(23 * 9, 24, dtype=dtype)
    pixel_conv(x, (23, 9), whole, weight=weight, reflect=True, backend="native")
    for begin in range(0, 23, 6):
        rows = begin, min(begin + 6, 23)
        band = torch.empty((rows[1] - rows[0]) * 9, 24, dtype=dtype)
        pixel_conv(x, (23, 9), band, weight=weight, reflect=True, rows=rows, backend="native")
        assert torch.equal(band, whole[rows[0] * 9 : rows[1] * 9])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_nothing(dtype, three_threads):
    parts, size = LAYERS["inner"], (128, 128, 61, 33)
    expected = results(parts, size, dtype, "native")
    torch.set_num_threads(1)
    actual = results(parts, size, dtype, "native")
    for a, e in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(a, e)


def test_large_sums_keep_their_digits():
    """Inputs of one sign and far from zero, as SiLU makes them of a norm with a large offset."""
    x, weight = draw(31 * 29, 128).abs() + 30, draw(128, 128, 3, 3).abs() / 1152
    outs = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "native")):
        outs.append(torch.empty(31 * 29, 128, dtype=dtype))
        made = pixel_conv_weight(weight.to(dtype), backend)
        pixel_conv(x.to(dtype), (31, 29), outs[-1], weight=made, reflect=True, backend=backend)
    assert_within_budget(outs[2], outs[0], outs[1])
