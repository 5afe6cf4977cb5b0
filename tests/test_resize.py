from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from suite import (
    DTYPES,
    LAYOUTS,
    SMALL_CASES,
    SUM_CASES,
    TRITON_DTYPES,
    Case,
    check_compile,
    check_deterministic_across_threads,
    check_gradcheck,
    check_gradients,
    check_opcheck,
    check_parity,
    for_triton,
    make_maps,
)
from util import assert_within_budget, layouts

import murf_fast

CASES = (
    *(c for c in SUM_CASES if len(c.maps) == 1),
    Case("up_and_down", ((5, 7, 23),), (19, 4)),
    Case("antialias_to_width_one", ((3, 9, 8),), (5, 1), antialias=True),
    Case("bicubic_antialias", ((6, 15, 13),), (7, 29), mode="bicubic", antialias=True),
)


def call(maps, case, backend):
    return murf_fast.resize(maps[0], case.size, **case.resize, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, layout, dtype):
    check_parity(call, case, dtype, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.name != "empty_batch"], ids=str)
def test_gradients(case, dtype, layout):
    check_gradients(call, case, dtype, layout)


def test_every_level(level):
    for case in CASES:
        check_parity(call, case, torch.float32, "channels_last")
        if case.batch:
            check_gradients(call, case, torch.bfloat16, "channels_last")
            check_gradients(call, case, torch.bfloat16, "contiguous")


@pytest.mark.parametrize(("mode", "antialias"), [("bilinear", False), ("bicubic", True), ("nearest", False)])
@pytest.mark.parametrize("factor", [(1.7, 0.6), 2.0, (0.31, 3.3)])
def test_scale_factor(factor, mode, antialias):
    def by_factor(maps, case, backend):
        return murf_fast.resize(maps[0], scale_factor=factor, mode=mode, antialias=antialias, backend=backend)

    case = Case("factor", ((5, 13, 17),), (0, 0))
    result = check_parity(by_factor, case, torch.float32, "channels_last")
    expected = torch.nn.functional.interpolate(make_maps(case)[0], scale_factor=factor, mode="area")
    assert result.shape == expected.shape
    check_gradients(by_factor, case, torch.float32, "contiguous")


@pytest.mark.parametrize(("mode", "antialias"), [("bilinear", False), ("bicubic", False), ("bicubic", True)])
def test_scale_factor_that_changes_no_size(mode, antialias):
    """torch copies in some modes and samples with step 1 / factor in others."""

    def by_factor(maps, case, backend):
        return murf_fast.resize(maps[0], scale_factor=1.1, mode=mode, antialias=antialias, backend=backend)

    check_parity(by_factor, Case("factor", ((5, 7, 6),), (0, 0)), torch.float32, "channels_last")


FACTORS = st.floats(1.0, 1.1) | st.floats(0.4, 2.6) | st.sampled_from([1.0, 1.1, 2.0, 2.001])


@pytest.mark.parametrize(
    ("mode", "antialias"), [("bilinear", False), ("bilinear", True), ("bicubic", False), ("bicubic", True)]
)
@given(shape=st.tuples(*[st.integers(1, 14)] * 2), factor=st.tuples(FACTORS, FACTORS), layout=st.sampled_from(LAYOUTS))
@settings(max_examples=25, deadline=None)
def test_any_factor(mode, antialias, shape, factor, layout):
    """Each axis may keep its size or not, by a factor that is not one."""
    assume(min(int(n * f) for n, f in zip(shape, factor, strict=True)) > 0)
    x = layouts(torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0)))[layout]

    def call(x, backend):
        return murf_fast.resize(x, scale_factor=factor, mode=mode, antialias=antialias, backend=backend)

    oracle = call(x.double(), "reference")
    if not antialias or oracle.shape[3] > 1:  # torch's antialiased results of one column are wrong, see below
        options = {"mode": mode, "antialias": antialias, "align_corners": False}
        torch.testing.assert_close(oracle, F.interpolate(x.double().contiguous(), scale_factor=factor, **options))
    assert_within_budget(call(x, "native"), oracle, call(x, "reference"))


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason=f"torch's kernels for {torch.backends.cpu.get_cpu_capability()} round positions otherwise",
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_nearest_modes_are_torchs_for_contiguous_maps(mode, backend, dtype):
    """In every layout, where rounding decides too: (17, 2) to (3, 243) reads one column of 243 otherwise."""
    targets = [{"size": size} for size in ((3, 243), (3, 41), (82, 90), (34, 4), (141, 141))]
    targets += [{"scale_factor": factor} for factor in (1.05, 2.001, (2.001, 70.5), (8.03, 1.3), (1.05, 140.2))]
    x = torch.randn(2, 5, 17, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    for target in targets:
        expected = F.interpolate(x, mode=mode, **target)
        for layout, map_ in layouts(x).items():
            actual = murf_fast.resize(map_, mode=mode, backend=backend, **target)
            assert torch.equal(actual, expected), (target, layout)
        if "size" in target:
            size = target["size"]
            assert torch.equal(murf_fast.upsample_concat([x], size, mode=mode, backend=backend), expected)
            assert torch.equal(murf_fast.upsample_sum([x], size, mode=mode, backend=backend), expected)
            labels = murf_fast.upsample_argmax([x], size, mode=mode, backend=backend)
            assert torch.equal(labels.long(), expected.argmax(1))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_antialiased_results_of_one_column(mode, backend):
    """In every layout what torch gives for channels_last maps, and for the transposed map."""
    x = torch.randn(2, 3, 9, 4, generator=torch.Generator().manual_seed(0))
    for target in ({"size": (5, 1)}, {"scale_factor": (0.6, 0.3)}):
        rule = {"mode": mode, "antialias": True}
        strided = x.contiguous(memory_format=torch.channels_last)
        oracle, same = (F.interpolate(m, align_corners=False, **target, **rule) for m in (strided.double(), strided))
        for layout in layouts(x).values():
            assert_within_budget(murf_fast.resize(layout, **target, **rule, backend=backend), oracle, same)


def test_gradcheck():
    check_gradcheck(call, Case("one_pixel", ((3, 4, 1),), (5, 7)))


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens"])
def test_registration(layout, needs_gradient):
    x = make_maps(CASES[0], layout=layout)[0].requires_grad_(needs_gradient)
    for channels_last in (False, True):
        arguments = ("bilinear", False, None, None, channels_last, "native")
        check_opcheck(torch.ops.murf_fast.resize.default, x, [11, 13], *arguments)
        check_opcheck(torch.ops.murf_fast.resize_adjoint.default, x, [3, 2], *arguments)
    rows = torch.zeros(1 + 11 * 13, x.shape[1])  # a prefix token and a map, as position tables have them
    out = rows[1:].unflatten(0, (11, 13)).permute(2, 0, 1)[None]
    check_opcheck(torch.ops.murf_fast.resize_out.default, x.detach()[:1], "bilinear", False, None, None, out, "native")


def test_compile():
    check_compile(call, CASES[0])


def test_threads():
    check_deterministic_across_threads(call, CASES[0])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.ones(2, 3)}, ValueError, r"`x` must be \(B, C, H, W\)"),
        ({"x": [torch.ones(1, 2, 3, 4)]}, TypeError, "`x` must be a tensor, got list"),
        ({"size": None}, ValueError, "exactly one of `size` and `scale_factor`"),
        ({"scale_factor": 2.0}, ValueError, "exactly one of `size` and `scale_factor`"),
        ({"size": None, "scale_factor": 2.0, "via": 4}, ValueError, "`via` needs `size`"),
        ({"size": None, "scale_factor": -1.0}, ValueError, "positive numbers, got -1.0"),
        ({"size": None, "scale_factor": 0.1}, ValueError, "leaves no pixel"),
        ({"size": (2**20, 2**21)}, ValueError, r"`size` must be at most .* and 2\*\*40 pixels"),
        ({"size": None, "scale_factor": 1e7}, ValueError, r"`scale_factor` must be at most .* and 2\*\*40 pixels"),
        ({"size": None, "scale_factor": "2"}, TypeError, "`scale_factor` must be a number, got '2'"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"x": torch.ones(1, 2, 3, 4), "size": (5, 6), **change}
    with pytest.raises(error, match=words):
        murf_fast.resize(**arguments)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", for_triton([c for c in SMALL_CASES if len(c.maps) == 1], CASES), ids=str)
def test_triton(case, layout, dtype, device):
    check_parity(call, case, dtype, layout, "triton", device)
    check_gradients(call, case, dtype, layout, "triton", device)


def test_triton_scale_factor(device):
    def scaled(maps, case, backend):
        return murf_fast.resize(maps[0], scale_factor=(1.7, 0.6), mode="bicubic", backend=backend)

    check_parity(scaled, SMALL_CASES[4], torch.float32, "contiguous", "triton", device)
