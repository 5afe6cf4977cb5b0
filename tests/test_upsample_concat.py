from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from suite import (
    CONCAT_CASES,
    DTYPES,
    GRADIENT_CASES,
    LAYOUTS,
    SMALL_CASES,
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
from util import assert_gradient_within_budget

import murf_fast


def call(maps, case, backend):
    return murf_fast.upsample_concat(maps, case.size, **case.resize, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CONCAT_CASES, ids=str)
def test_parity(case, layout, dtype):
    result = check_parity(call, case, dtype, layout)
    first = make_maps(case, dtype, layout)[0]
    if layout in ("channels_last", "tokens") and first.shape[1] > 1 and not first.is_contiguous():
        assert result.is_contiguous(memory_format=torch.channels_last)
    else:
        assert result.is_contiguous()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level(level, dtype, layout):
    for case in CONCAT_CASES:
        check_parity(call, case, dtype, layout)


@given(
    maps=st.lists(st.tuples(*[st.integers(1, 20)] * 3), min_size=1, max_size=4),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    via=st.none() | st.tuples(st.integers(1, 25), st.integers(1, 25)),
    mode=st.sampled_from(["bilinear", "bicubic", "area", "nearest"]),
    antialias=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(maps, size, via, mode, antialias, layout):
    case = Case("drawn", tuple(maps), size, mode, antialias and mode in ("bilinear", "bicubic"), via, batch=1)
    check_parity(call, case, torch.float32, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", by_name(CONCAT_CASES, ("different_channels", *GRADIENT_CASES)), ids=str)
def test_gradients(case, dtype, layout):
    check_gradients(call, case, dtype, layout)


def test_gradients_at_every_level(level):
    for case in by_name(CONCAT_CASES, GRADIENT_CASES):
        check_gradients(call, case, torch.float32, "channels_last")
        check_gradients(call, case, torch.float32, "contiguous")


def test_gradcheck():
    check_gradcheck(call, by_name(CONCAT_CASES, ("one_pixel",))[0])


def test_gradient_of_an_expanded_upstream():
    """A sum hands the backward a gradient with zero strides."""
    case = CONCAT_CASES[0]

    def gradients(maps, backend):
        return torch.autograd.grad(call(maps, case, backend).sum(), maps)

    check_against_oracle(gradients, case)


def test_twice_differentiable():
    case = CONCAT_CASES[0]

    def second(maps, backend):
        first = torch.autograd.grad(call(maps, case, backend).pow(3).sum(), maps, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), maps)

    check_against_oracle(second, case)


def check_against_oracle(gradients, case):
    maps = [m.requires_grad_() for m in make_maps(case)]
    oracle = gradients([m.detach().double().requires_grad_() for m in maps], "reference")
    for a, o, s in zip(gradients(maps, "native"), oracle, gradients(maps, "reference"), strict=True):
        assert_gradient_within_budget(a, o, s)


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens"])
def test_registration(layout, channels_last, needs_gradient):
    maps = [m.requires_grad_(needs_gradient) for m in make_maps(CONCAT_CASES[0], layout=layout)]
    op = torch.ops.murf_fast.upsample_concat.default
    check_opcheck(op, maps, [11, 13], "bilinear", False, None, channels_last, "native")
    check_opcheck(op, maps, [11, 13], "bicubic", False, [5, 6], channels_last, "native")


def test_registration_of_out():
    maps = make_maps(CONCAT_CASES[0])
    out = torch.zeros(2, 22, 11, 13)
    op = torch.ops.murf_fast.upsample_concat_out.default
    check_opcheck(op, maps, [11, 13], "bilinear", False, None, out, "native")


def test_compile():
    check_compile(call, CONCAT_CASES[0])
    check_compile(call, by_name(CONCAT_CASES, ("via",))[0])


@pytest.mark.parametrize("name", ["different_channels", "many_rows", "one_channel"])
def test_threads(name):
    check_deterministic_across_threads(call, by_name(CONCAT_CASES, (name,))[0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_out(backend, layout):
    case = CONCAT_CASES[0]
    maps = make_maps(case)
    out = torch.empty(2, 22, *case.size).to(memory_format=layout)
    address = out.data_ptr()
    result = murf_fast.upsample_concat(maps, case.size, out=out, backend=backend)
    assert result is out
    assert out.data_ptr() == address
    torch.testing.assert_close(out, call(maps, case, "reference"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_streamed_result(layout, dtype):
    """Above 8 MB results bypass the caches; run lengths and alignment must not matter."""
    for channels in (3, 37, 768):
        width = 9_000_000 // (dtype.itemsize * channels * 11) + 1
        check_parity(call, Case("streamed", ((channels, 5, 4),), (11, width), batch=1), dtype, layout)


def test_non_finite_values_stay_where_torch_has_them():
    x = torch.randn(1, 3, 5, 4)
    x[0, 0, 2, 1], x[0, 1, 0, 0], x[0, 2, 4, 3] = torch.inf, torch.nan, -torch.inf
    for mode in ("bilinear", "bicubic", "area"):
        actual = murf_fast.upsample_concat([x], (13, 11), mode=mode)
        expected = murf_fast.upsample_concat([x], (13, 11), mode=mode, backend="reference")
        # A tap of weight zero is not read, where torch multiplies it: zero times infinity.
        assert not (actual.isfinite() & expected.isfinite() & (actual - expected).abs().gt(1e-4)).any()
        assert (~actual.isfinite() <= ~expected.isfinite()).all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"features": []}, TypeError, "`features` must be a non-empty list"),
        ({"features": [torch.ones(1, 2, 3, 4), 7]}, TypeError, r"`features\[1\]` must be a tensor, got int"),
        ({"features": [torch.ones(1, 2, 3, 4, dtype=torch.int32)]}, TypeError, "int32"),
        ({"features": [torch.ones(2, 3, 4)]}, ValueError, r"must be \(B, C, H, W\), got shape \(2, 3, 4\)"),
        ({"features": [torch.ones(1, 2, 0, 4)]}, ValueError, "C, H, W >= 1"),
        ({"features": [torch.ones(1, 2, 3, 4), torch.ones(2, 2, 3, 4)]}, ValueError, "batch size of .* 1, got 2"),
        ({"features": [torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4).half()]}, TypeError, "float32, got .*float16"),
        ({"features": [torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4, device="meta")]}, ValueError, "cpu, got meta"),
        ({"size": (0, 4)}, ValueError, r"`size` must be positive, got \(0, 4\)"),
        ({"size": (4.0, 4)}, TypeError, "`size` must be"),
        ({"size": (4, 4, 4)}, TypeError, "`size` must be"),
        ({"via": (4, -1)}, ValueError, "`via` must be positive"),
        ({"mode": "lanczos"}, ValueError, "`mode` must be one of .*'lanczos'"),
        ({"mode": "area", "antialias": True}, ValueError, "`antialias=True` needs `mode`"),
        ({"memory_format": torch.channels_last_3d}, ValueError, "`memory_format`"),
        ({"backend": "cuda"}, ValueError, "`backend` must be one of"),
        ({"out": torch.ones(1, 2, 5, 5)}, ValueError, r"`out` must have shape \(1, 2, 5, 6\)"),
        ({"out": torch.ones(1, 2, 5, 6).bfloat16()}, TypeError, "`out` must have the dtype"),
        ({"out": torch.ones(1, 2, 6, 5).mT}, ValueError, "`out` must be dense"),
        ({"out": torch.ones(1, 2, 5, 6, requires_grad=True)}, ValueError, "`out` cannot be given while gradients"),
        ({"out": torch.ones(1, 2, 5, 6), "memory_format": torch.channels_last}, ValueError, "which is not"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"features": [torch.ones(1, 2, 3, 4)], "size": (5, 6), **change}
    with pytest.raises(error, match=words):
        murf_fast.upsample_concat(**arguments)


def test_out_overlapping_an_input():
    memory = torch.zeros(1000)
    x = memory[:12].view(1, 1, 3, 4)
    with pytest.raises(ValueError, match="must not share memory"):
        murf_fast.upsample_concat([x], (5, 6), out=memory[8:38].view(1, 1, 5, 6))
    murf_fast.upsample_concat([x], (5, 6), out=memory[12:42].view(1, 1, 5, 6))


def test_backend_that_is_not_there():
    with pytest.raises(murf_fast.BackendUnavailableError, match="float64 runs through the reference only"):
        murf_fast.upsample_concat([torch.ones(1, 2, 3, 4, dtype=torch.float64)], 5, backend="native")


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", for_triton(SMALL_CASES[:1], CONCAT_CASES), ids=str)
def test_triton(case, layout, dtype, device):
    check_parity(call, case, dtype, layout, "triton", device)
    check_gradients(call, case, dtype, layout, "triton", device)


def test_triton_graph_capture_and_other_stream(gpu):
    case = CONCAT_CASES[0]
    maps = [m.to(gpu) for m in make_maps(case)]
    expected = call(maps, case, "triton")
    with torch.cuda.stream(torch.cuda.Stream()):
        other = call(maps, case, "triton")
    torch.cuda.synchronize()
    assert torch.equal(other, expected)
    out, graph = torch.empty_like(expected), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        murf_fast.upsample_concat(maps, case.size, **case.resize, out=out, backend="triton")
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
