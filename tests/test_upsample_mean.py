from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from suite import (
    DTYPES,
    LAYOUTS,
    SMALL_CASES,
    SUM_CASES,
    TINY_CASE,
    TRITON_DTYPES,
    check_compile,
    check_gradients,
    check_parity,
    for_triton,
    make_maps,
)
from util import assert_gradient_within_budget

import murf_fast

GOLDEN = np.load(Path(__file__).parent / "golden" / "anomaly__score_fusion.npz")


def call(maps, case, backend):
    return murf_fast.upsample_mean(maps, case.size, **case.resize, backend=backend)


def call_weighted(maps, case, backend):
    weights = [0.5 + i for i in range(len(maps))]
    return murf_fast.upsample_mean(maps, case.size, weights, **case.resize, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SUM_CASES, ids=str)
@pytest.mark.parametrize("function", [call, call_weighted], ids=["mean", "weighted"])
def test_parity(function, case, layout, dtype):
    check_parity(function, case, dtype, layout)


@pytest.mark.parametrize("name", ["one_channel", "up", "via"])
def test_gradients(name):
    case = next(c for c in SUM_CASES if c.name == name)
    check_gradients(call_weighted, case, torch.float32, "contiguous")


def test_gradient_of_weights():
    case = SUM_CASES[0]

    def gradient(dtype, backend):
        weights = torch.tensor([0.3, 1.2], dtype=dtype, requires_grad=True)
        maps = [m.to(dtype) for m in make_maps(case)]
        result = murf_fast.upsample_mean(maps, case.size, weights, backend=backend)
        direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return torch.autograd.grad(result, weights, direction)[0]

    oracle, same_dtype = gradient(torch.float64, "reference"), gradient(torch.float32, "reference")
    assert_gradient_within_budget(gradient(torch.float32, "native"), oracle, same_dtype)


def test_maps_of_one_grid_are_resized_once(monkeypatch):
    seen = []
    launch = murf_fast.native.upsample_sum
    monkeypatch.setattr(
        murf_fast.native, "upsample_sum", lambda maps, *rest: (seen.append(len(maps)), launch(maps, *rest))
    )
    maps = [torch.rand(1, 1, *grid) for grid in ((4, 6), (5, 8), (4, 6), (5, 8), (4, 6))]
    murf_fast.upsample_mean(maps, (20, 30))
    assert seen == [2]


def test_golden():
    """15 score maps of MRF-AD's grids; the stored float32 mean of torch is off by 1.6e-7 itself."""
    maps = [torch.from_numpy(GOLDEN[f"maps{i}"]) for i in range(5)]
    layers = [m[None, layer : layer + 1] for m in maps for layer in range(3)]
    actual = murf_fast.upsample_mean(layers, tuple(int(n) for n in GOLDEN["size"]))
    assert (actual[0, 0].numpy() - GOLDEN["fused"]).__abs__().max() <= 3 * 1.6e-7


def test_out():
    case = SUM_CASES[0]
    out = torch.empty(2, 5, *case.size)
    assert murf_fast.upsample_mean(make_maps(case), case.size, out=out) is out
    assert torch.equal(out, call(make_maps(case, layout="contiguous"), case, "native"))


def test_compile():
    check_compile(call_weighted, SUM_CASES[0])


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        ([1.0], ValueError, "one entry per map, 2, got 1"),
        ([1.0, -1.0], ValueError, "must not sum to zero"),
        (["a", 1], TypeError, "`weights` must be a number, got 'a'"),
        (torch.ones(3), ValueError, r"shape \(2,\), one entry per map, got \(3,\)"),
    ],
)
def test_bad_weights(weights, error, words):
    with pytest.raises(error, match=words):
        murf_fast.upsample_mean([torch.ones(1, 1, 3, 4), torch.ones(1, 1, 5, 4)], 9, weights)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("case", for_triton((*SMALL_CASES[:2], TINY_CASE), SUM_CASES), ids=str)
@pytest.mark.parametrize("function", [call, call_weighted], ids=["mean", "weighted"])
def test_triton(function, case, dtype, device):
    check_parity(function, case, dtype, "contiguous", "triton", device)
    check_gradients(function, case, torch.float32, "contiguous", "triton", device)
