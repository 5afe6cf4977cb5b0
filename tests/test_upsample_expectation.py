from __future__ import annotations

import pytest
import torch
from suite import (
    DTYPES,
    GRADIENT_CASES,
    LAYOUTS,
    MANY_CLASSES,
    SMALL_CASES,
    SUM_CASES,
    TINY_CASE,
    TRITON_DTYPES,
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
from test_upsample_sum import bias_for
from util import assert_gradient_within_budget

import murf_fast


def values_for(case, dtype):
    return torch.linspace(0.5, 10.0, case.maps[0][0], dtype=torch.float64).to(dtype)


def caller(norm):
    def call(maps, case, backend):
        dtype = maps[0].dtype
        return murf_fast.upsample_expectation(
            maps,
            case.size,
            values_for(case, dtype).to(maps[0].device),
            bias=bias_for(case, case.batch == 2, dtype).to(maps[0].device),
            norm=norm,
            **case.resize,
            backend=backend,
        )

    return call


NORMS = pytest.mark.parametrize("call", [caller("softmax"), caller("linear")], ids=["softmax", "linear"])


@NORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SUM_CASES, ids=str)
def test_parity(case, layout, dtype, call):
    check_parity(call, case, dtype, layout)


@NORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level(level, dtype, call):
    for case in SUM_CASES:
        check_parity(call, case, dtype, "channels_last")
    for case in by_name(SUM_CASES, ("seventeen", "down")):
        check_gradients(call, case, dtype, "channels_last")


@NORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", by_name(SUM_CASES, GRADIENT_CASES), ids=str)
def test_gradients(case, layout, dtype, call):
    if case.name == "one_channel" and call is not None:
        # One bin: the expectation is constant and its true gradient zero.
        maps = [m.requires_grad_() for m in make_maps(case, dtype, layout)]
        for gradient in torch.autograd.grad(call(maps, case, "native").sum(), maps):
            assert not gradient.any()
        return
    check_gradients(call, case, dtype, layout)


@pytest.mark.parametrize("norm", ["softmax", "linear"])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("case", by_name(SUM_CASES, ("seventeen", "many_rows")), ids=str)
def test_gradients_of_bias_and_values(case, batch, norm, three_threads):

    def gradients(dtype, backend):
        maps = [m.to(dtype) for m in make_maps(case)]
        bias = bias_for(case, batch, dtype).requires_grad_()
        values = values_for(case, dtype).requires_grad_()
        result = murf_fast.upsample_expectation(maps, case.size, values, bias=bias, norm=norm, backend=backend)
        direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return torch.autograd.grad(result, (bias, values), direction)

    oracle, same_dtype = gradients(torch.float64, "reference"), gradients(torch.float32, "reference")
    for a, o, s in zip(gradients(torch.float32, "native"), oracle, same_dtype, strict=True):
        assert_gradient_within_budget(a, o, s)


def test_large_logits(level):
    """Differences of thousands saturate the softmax without overflow, and -inf logits count for nothing."""
    x = torch.randn(1, 19, 3, 3) * 3000
    x[0, 5] = -torch.inf
    values = torch.linspace(0, 1, 19)
    # torch's bilinear multiplies the infinite neighbours of an exact hit by zero; nearest does not touch them.
    actual = murf_fast.upsample_expectation([x], (3, 3), values)
    expected = murf_fast.upsample_expectation([x], (3, 3), values, mode="nearest", backend="reference")
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 37])
def test_the_greatest_logit_is_found_wherever_it_is(level, classes):
    """One class of each pixel is so far above the others that a smaller maximum would overflow."""
    logits = torch.full((1, classes, 1, classes), -3000.0)
    logits[0, range(classes), 0, range(classes)] = 3000.0
    values = torch.arange(1.0, classes + 1)
    assert torch.equal(murf_fast.upsample_expectation(logits, (1, classes), values)[0, 0], values)


def test_result_dtype_is_promoted():
    x = torch.randn(1, 4, 3, 3).bfloat16()
    assert murf_fast.upsample_expectation([x], 5, torch.rand(4)).dtype == torch.float32
    assert murf_fast.upsample_expectation([x], 5, torch.rand(4).bfloat16()).dtype == torch.bfloat16
    assert murf_fast.upsample_expectation([x], 5, torch.rand(4).double()).dtype == torch.float64


@NORMS
def test_gradcheck(call):
    check_gradcheck(call, by_name(SUM_CASES, ("one_pixel",))[0])


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_registration(layout, needs_gradient):
    case = SUM_CASES[0]
    maps = [m.requires_grad_(needs_gradient) for m in make_maps(case, layout=layout)]
    bias = bias_for(case, True, torch.float32).requires_grad_(needs_gradient)
    values = values_for(case, torch.float32).requires_grad_(needs_gradient)
    op = torch.ops.murf_fast.upsample_expectation.default
    check_opcheck(op, maps, bias, values, [11, 13], True, "bilinear", False, None, "native")
    check_opcheck(op, maps, None, values, [11, 13], False, "bicubic", False, [4, 5], "native")


def test_registration_of_backward():
    case = SUM_CASES[0]
    op = torch.ops.murf_fast.upsample_expectation_backward.default
    values = values_for(case, torch.float32)
    check_opcheck(
        op, torch.ones(2, 11, 13), make_maps(case), None, values, True, "bilinear", False, None, True, "native"
    )


def test_compile():
    check_compile(caller("softmax"), SUM_CASES[0])


@NORMS
def test_threads(call):
    check_deterministic_across_threads(call, by_name(SUM_CASES, ("many_rows",))[0])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"values": torch.ones(3)}, ValueError, r"`values` must have shape \(2,\), one value per channel, got \(3,\)"),
        ({"values": [1.0, 2.0]}, TypeError, "`values` must be a floating-point tensor, got list"),
        ({"values": torch.ones(2, device="meta")}, ValueError, "`values` must be on cpu, got meta"),
        ({"norm": "sigmoid"}, ValueError, "`norm` must be one of .*'sigmoid'"),
        ({"features": [torch.ones(1, 2, 3, 4), torch.ones(1, 5, 3, 4)]}, ValueError, "channels of .* 2, got 5"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"features": [torch.ones(1, 2, 3, 4)], "size": (5, 6), "values": torch.ones(2), **change}
    with pytest.raises(error, match=words):
        murf_fast.upsample_expectation(**arguments)


@pytest.mark.parametrize("norm", ["softmax", "linear"])
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("case", for_triton((*SMALL_CASES[:2], SMALL_CASES[3], MANY_CLASSES), SUM_CASES), ids=str)
def test_triton(case, dtype, norm, device):
    check_parity(caller(norm), case, dtype, "channels_last", "triton", device)


@pytest.mark.parametrize("norm", ["softmax", "linear"])
@pytest.mark.parametrize("case", for_triton((TINY_CASE, MANY_CLASSES), SUM_CASES), ids=str)
def test_triton_gradients(case, norm, device):
    check_gradients(caller(norm), case, torch.float32, "channels_last", "triton", device)


@pytest.mark.parametrize("norm", ["softmax", "linear"])
def test_triton_gradient_of_values(norm, device):
    maps = [m.to(device) for m in make_maps(SMALL_CASES[1])]

    def gradient(backend, dtype):
        values = torch.linspace(1, 3, 17, dtype=dtype, device=device).requires_grad_()
        x = [m.to(dtype) for m in maps]
        out = murf_fast.upsample_expectation(x, (3, 5), values, norm=norm, backend=backend)
        return torch.autograd.grad(out.square().sum(), values)[0]

    assert_gradient_within_budget(
        gradient("triton", torch.float32), gradient("reference", torch.float64), gradient("reference", torch.float32)
    )
