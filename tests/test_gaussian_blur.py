from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from suite import DTYPES, LAYOUTS, TRITON_DTYPES, check_opcheck, for_triton
from util import assert_within_budget, layouts

from murf_fast import gaussian_blur

GOLDEN = np.load(Path(__file__).parent / "golden" / "anomaly__score_fusion.npz")


def check(x, sigma, border, backend="native"):
    oracle = gaussian_blur(x.double(), sigma, border=border, backend="reference")
    same = gaussian_blur(x, sigma, border=border, backend="reference")
    # Positive taps that sum to one: an average of large pixels that cancel carries the pixels' roundings.
    terms = float(x.abs().max()) / 4
    assert_within_budget(gaussian_blur(x, sigma, border=border, backend=backend), oracle, same, terms=terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("border", ["symmetric", "reflect"])
def test_parity_with_the_dense_convolution(border, layout, dtype):
    x = torch.randn(2, 3, 41, 37, generator=torch.Generator().manual_seed(0)).to(dtype)
    for sigma in (0.5, 2.0):
        check(layouts(x)[layout], sigma, border)


@given(
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    sigma=st.floats(0.1, 6),
    border=st.sampled_from(["symmetric", "reflect"]),
)
@settings(max_examples=30, deadline=None)
def test_any_size(size, sigma, border):
    """Also maps that are smaller than the filter's radius: mirrored more than once."""
    check(torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(0)), sigma, border)


def test_every_level(level):
    check(torch.randn(1, 2, 33, 50, generator=torch.Generator().manual_seed(0)), 4.0, "symmetric")


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("border", ["symmetric", "reflect"])
def test_triton(border, layout, dtype, device):
    for shape, sigma in for_triton([((2, 3, 6, 5), 1.0), ((1, 1, 2, 3), 1.5)], [((2, 3, 141, 37), 4.0)]):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        check(layouts(x)[layout], sigma, border, "triton")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_triton_many_taps(layout, device):
    """Several tiles along an axis, and more taps than one float32 sum takes; on the other axis mirrored repeatedly."""
    x = torch.randn(1, 2, 3, 141, generator=torch.Generator().manual_seed(0)).to(device)
    check(layouts(x)[layout], 9.0, "reflect", "triton")


@pytest.mark.parametrize(
    ("key", "sigma", "border", "allowed"),
    [
        ("blur.scipy_sigma4", 4.0, "symmetric", 1e-6),
        ("blur.scipy_sigma1_5", 1.5, "symmetric", 1e-6),
        ("blur.anomalib_sigma4", 4.0, "reflect", 6e-6),
        ("blur.anomalib_sigma2", 2.0, "reflect", 6e-6),
    ],
)
def test_golden_of_scipy_and_anomalib(key, sigma, border, allowed):
    fused = torch.from_numpy(GOLDEN["fused"])[None, None]
    actual = gaussian_blur(fused, sigma, border=border)[0, 0, ::3].numpy()
    assert np.abs(actual - GOLDEN[key]).max() <= allowed


def test_registration_and_compile():
    x = torch.randn(1, 2, 9, 8)
    op = torch.ops.murf_fast.gaussian_blur.default
    check_opcheck(op, x, 1.0, "reflect", False, "native")
    check_opcheck(op, x.contiguous(memory_format=torch.channels_last), 1.0, "symmetric", True, "native")
    compiled = torch.compile(lambda x: gaussian_blur(x * 2, 1.0) + 1, fullgraph=True)
    assert torch.equal(compiled(x), gaussian_blur(x * 2, 1.0) + 1)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.ones(3, 4)}, ValueError, r"`x` must be \(B, C, H, W\)"),
        ({"sigma": 0}, ValueError, "`sigma` must be a positive number"),
        ({"border": "zero"}, ValueError, "`border` must be one of"),
        ({"x": torch.ones(1, 1, 3, 4, requires_grad=True)}, ValueError, "has no gradient"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"x": torch.ones(1, 1, 3, 4), "sigma": 1.0, "border": "reflect", **change}
    with pytest.raises(error, match=words):
        gaussian_blur(arguments["x"], arguments["sigma"], border=arguments["border"])
