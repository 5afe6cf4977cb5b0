from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from suite import (
    DTYPES,
    GRADIENT_CASES,
    LAYOUTS,
    SMALL_CASES,
    SUM_CASES,
    TRITON_DTYPES,
    Case,
    by_name,
    check_compile,
    check_deterministic_across_threads,
    check_gradcheck,
    check_gradients,
    check_opcheck,
    check_parity,
    for_triton,
    make_maps,
)
from util import assert_gradient_within_budget, assert_within_budget

import murf_fast


def bias_for(case, batch, dtype):
    shape = (case.batch, case.maps[0][0]) if batch else (case.maps[0][0],)
    entries = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(1 + 2 * entries).view(shape).to(dtype)


def call(maps, case, backend):
    bias = bias_for(case, case.batch == 2, maps[0].dtype).to(maps[0].device)
    return murf_fast.upsample_sum(maps, case.size, bias=bias, **case.resize, backend=backend)


def call_without_bias(maps, case, backend):
    return murf_fast.upsample_sum(maps, case.size, **case.resize, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SUM_CASES, ids=str)
def test_parity(case, layout, dtype):
    check_parity(call, case, dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level(level, dtype):
    for case in SUM_CASES:
        for layout in ("contiguous", "channels_last"):
            check_parity(call, case, dtype, layout)
            check_parity(call_without_bias, case, dtype, layout)


@given(
    grids=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=6),
    channels=st.integers(1, 40),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    mode=st.sampled_from(["bilinear", "bicubic", "area"]),
    layout=st.sampled_from(LAYOUTS),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(grids, channels, size, mode, layout):
    case = Case("drawn", tuple((channels, *g) for g in grids), size, mode, batch=1)
    check_parity(call, case, torch.float32, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", by_name(SUM_CASES, GRADIENT_CASES), ids=str)
def test_gradients(case, dtype, layout):
    check_gradients(call, case, dtype, layout)


@pytest.mark.parametrize("batch", [False, True])
def test_gradient_of_bias(batch):
    case = SUM_CASES[0]

    def gradient(dtype, backend):
        maps = [m.to(dtype) for m in make_maps(case)]
        bias = bias_for(case, batch, dtype).requires_grad_()
        result = murf_fast.upsample_sum(maps, case.size, bias=bias, backend=backend)
        direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return torch.autograd.grad(result, bias, direction)[0]

    oracle, same_dtype = gradient(torch.float64, "reference"), gradient(torch.float32, "reference")
    assert_gradient_within_budget(gradient(torch.float32, "native"), oracle, same_dtype)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_to_nearest_even(level, dtype, memory_format):
    """Every exponent with values at and around a tie, subnormals, infinities and NaN: as torch rounds."""
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    lower = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    bits = torch.cat([upper | low for low in lower])
    values = bits.where(bits < 2**31, bits - 2**32).to(torch.int32).view(torch.float32)
    zeros = torch.zeros(1, len(values), 1, 1, dtype=dtype)
    actual = murf_fast.upsample_sum([zeros], (1, 1), bias=values, memory_format=memory_format)
    assert torch.equal(actual.flatten().isnan(), values.isnan())
    assert torch.equal(actual.flatten().nan_to_num(nan=0.0), values.to(dtype).nan_to_num(nan=0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reads_every_half_value(level, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int64).to(torch.int16)
    values = bits.view(dtype).view(1, -1, 1, 1)
    actual = murf_fast.upsample_sum([values], (1, 1)).flatten()
    assert torch.equal(actual.isnan(), values.flatten().isnan())
    assert torch.equal(actual.nan_to_num(nan=0.0), values.flatten().nan_to_num(nan=0.0))


def test_gradcheck():
    check_gradcheck(call, by_name(SUM_CASES, ("one_pixel",))[0])


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_registration(layout, needs_gradient):
    case = SUM_CASES[0]
    maps = [m.requires_grad_(needs_gradient) for m in make_maps(case, layout=layout)]
    bias = bias_for(case, True, torch.float32).requires_grad_(needs_gradient)
    op = torch.ops.murf_fast.upsample_sum.default
    check_opcheck(op, maps, bias, [11, 13], "bilinear", False, None, True, "native")
    check_opcheck(op, maps, None, [11, 13], "area", False, [4, 5], False, "native")


def test_registration_of_out():
    maps = make_maps(SUM_CASES[0])
    op = torch.ops.murf_fast.upsample_sum_out.default
    check_opcheck(op, maps, None, [11, 13], "bilinear", False, None, torch.zeros(2, 5, 11, 13), "native")


def test_compile():
    check_compile(call, SUM_CASES[0])


@pytest.mark.parametrize("name", ["seventeen", "many_rows", "one_channel", "via"])
def test_threads(name):
    check_deterministic_across_threads(call, by_name(SUM_CASES, (name,))[0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_out(layout):
    case = SUM_CASES[0]
    out = torch.empty(2, 5, *case.size).to(memory_format=layout)
    result = murf_fast.upsample_sum(make_maps(case), case.size, out=out)
    assert result is out
    assert torch.equal(out, murf_fast.upsample_sum(make_maps(case), case.size, memory_format=layout))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"features": [torch.ones(1, 2, 3, 4), torch.ones(1, 3, 3, 4)]}, ValueError, "channels of .* 2, got 3"),
        ({"bias": torch.ones(3)}, ValueError, r"`bias` must have shape \(2,\) or \(1, 2\).*got \(3,\)"),
        ({"bias": [0.0, 1.0]}, TypeError, "`bias` must be a floating-point tensor, got list"),
        ({"bias": torch.ones(2, dtype=torch.int64)}, TypeError, "`bias` .* got torch.int64"),
        ({"bias": torch.ones(2, device="meta")}, ValueError, "`bias` must be on cpu, got meta"),
        ({"size": -3}, ValueError, "`size` must be positive"),
        ({"out": torch.ones(1, 3, 5, 6)}, ValueError, "`out` must have shape"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"features": [torch.ones(1, 2, 3, 4)], "size": (5, 6), **change}
    with pytest.raises(error, match=words):
        murf_fast.upsample_sum(**arguments)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", for_triton(SMALL_CASES, SUM_CASES), ids=str)
def test_triton(case, layout, dtype, device):
    check_parity(call, case, dtype, layout, "triton", device)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", for_triton(SMALL_CASES, SUM_CASES), ids=str)
def test_triton_gradients(case, layout, device):
    """Also transposed rows without taps, which downsampling by nearest leaves."""
    check_gradients(call, case, torch.float32, layout, "triton", device)


def test_triton_more_than_2_31_elements(gpu):
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of GPU memory")
    x = torch.randn(1, 1024, 3, 5, device=gpu, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    size = (1500, 1501)
    out = murf_fast.upsample_sum([x], size, backend="triton")
    assert out.numel() > 2**31
    rows = murf_fast.reference.upsample_sum([x.double()[:, -8:]], size)[:, :, -4:]
    same = murf_fast.reference.upsample_sum([x[:, -8:]], size)[:, :, -4:]
    assert_within_budget(out[:, -8:, -4:], rows, same)
