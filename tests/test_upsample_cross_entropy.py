from __future__ import annotations

import itertools

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
from test_upsample_sum import bias_for
from util import assert_gradient_within_budget

import murf_fast

CASES = tuple(c for c in SUM_CASES if c.batch)


def target_for(case, ignore_index=-100):
    pixels = torch.arange(case.batch * case.size[0] * case.size[1])
    target = pixels * 7919 % 101 % case.maps[0][0]
    if len(pixels) > 4:
        target = target.where(pixels % 5 != 2, ignore_index)
    return target.view(case.batch, *case.size)


def caller(reduction="mean", ignore_index=-100, weighted=False, label_smoothing=0.0):
    def call(maps, case, backend):
        dtype, classes = maps[0].dtype, case.maps[0][0]
        weight = torch.linspace(0.5, 2.0, classes, dtype=torch.float64).to(dtype) if weighted else None
        return murf_fast.upsample_cross_entropy(
            maps,
            target_for(case, ignore_index).to(maps[0].device),
            bias=bias_for(case, case.batch == 2, dtype).to(maps[0].device),
            **case.resize,
            ignore_index=ignore_index,
            weight=None if weight is None else weight.to(maps[0].device),
            label_smoothing=label_smoothing,
            reduction=reduction,
            backend=backend,
        )

    return call


OPTIONS = {
    f"{reduction}{'-weighted' if weighted else ''}{'-smoothed' if smoothing else ''}": caller(
        reduction, weighted=weighted, label_smoothing=smoothing
    )
    for reduction, weighted, smoothing in itertools.product(("mean", "sum", "none"), (False, True), (0.0, 0.1))
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, layout, dtype):
    check_parity(caller("none"), case, dtype, layout)


@pytest.mark.parametrize("call", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(call):
    for case in by_name(CASES, ("seventeen", "to_one_pixel")):
        check_parity(call, case, torch.float32, "channels_last")
        check_gradients(call, case, torch.float32, "channels_last")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level(level, dtype):
    call = OPTIONS["none-weighted-smoothed"]
    for case in CASES:
        check_parity(call, case, dtype, "channels_last")
    for case in by_name(CASES, ("seventeen", "down")):
        check_gradients(call, case, dtype, "channels_last")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", by_name(CASES, tuple(n for n in GRADIENT_CASES if n != "one_channel")), ids=str)
def test_gradients(case, layout, dtype):
    check_gradients(caller("none"), case, dtype, layout)


@pytest.mark.parametrize("batch", [False, True])
def test_gradient_of_bias(batch):
    case = by_name(CASES, ("seventeen",))[0]

    def gradient(dtype, backend):
        bias = bias_for(case, batch, dtype).requires_grad_()
        maps = [m.to(dtype) for m in make_maps(case)]
        loss = murf_fast.upsample_cross_entropy(maps, target_for(case), bias=bias, backend=backend)
        return torch.autograd.grad(loss, bias)[0]

    oracle, same_dtype = gradient(torch.float64, "reference"), gradient(torch.float32, "reference")
    assert_gradient_within_budget(gradient(torch.float32, "native"), oracle, same_dtype)


@pytest.mark.parametrize("ignore_index", [-100, 3, 255])
def test_ignore_index(ignore_index):
    case = by_name(CASES, ("seventeen",))[0]
    check_parity(caller("none", ignore_index), case, torch.float32, "channels_last")
    check_parity(caller("mean", ignore_index), case, torch.float32, "channels_last")


def test_everything_ignored_is_nan_as_in_torch():
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    target = torch.full((1, 6, 6), 255)
    for backend in ("native", "reference"):
        assert murf_fast.upsample_cross_entropy([x], target, ignore_index=255, backend=backend).isnan()
    loss = murf_fast.upsample_cross_entropy([x], target, ignore_index=255, reduction="sum")
    assert loss == 0
    assert not torch.autograd.grad(loss, x)[0].any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_label_dtypes(dtype):
    x = torch.randn(2, 4, 3, 3)
    target = torch.randint(0, 4, (2, 7, 5))
    expected = murf_fast.upsample_cross_entropy([x], target)
    assert torch.equal(murf_fast.upsample_cross_entropy([x], target.to(dtype)), expected)


def test_large_logits(level):
    x = torch.randn(1, 19, 3, 3) * 3000
    target = torch.randint(0, 19, (1, 3, 3))
    torch.testing.assert_close(
        murf_fast.upsample_cross_entropy([x], target, reduction="none"),
        murf_fast.upsample_cross_entropy([x], target, reduction="none", backend="reference"),
    )


def test_gradcheck():
    check_gradcheck(OPTIONS["mean-weighted-smoothed"], by_name(CASES, ("one_pixel",))[0])


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_registration(layout, needs_gradient):
    case = CASES[0]
    maps = [m.requires_grad_(needs_gradient) for m in make_maps(case, layout=layout)]
    bias = bias_for(case, True, torch.float32).requires_grad_(needs_gradient)
    op = torch.ops.murf_fast.upsample_cross_entropy.default
    target = target_for(case)
    check_opcheck(op, maps, bias, target, torch.rand(5), "bilinear", False, None, -100, 0.1, "native")
    check_opcheck(op, maps, None, target, None, "bicubic", False, [4, 5], -100, 0.0, "native")


def test_registration_of_backward():
    case = CASES[0]
    op = torch.ops.murf_fast.upsample_cross_entropy_backward.default
    target = target_for(case)
    ones = torch.ones(target.shape)
    lse = torch.ones((2, *target.shape))
    check_opcheck(op, ones, make_maps(case), None, target, None, lse, "bilinear", False, None, -100, 0.0, "native")


def test_compile():
    check_compile(OPTIONS["none-weighted-smoothed"], CASES[0])


def test_threads():
    check_deterministic_across_threads(caller("none"), by_name(CASES, ("many_rows",))[0])


X, T = torch.ones(1, 2, 3, 4), torch.zeros(1, 5, 6, dtype=torch.int64)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"target": T.float()}, TypeError, "`target` must be an integer tensor .* got torch.float32"),
        ({"target": T[0]}, ValueError, r"`target` must be \(B, H, W\).*got \(5, 6\)"),
        ({"target": T.repeat(2, 1, 1)}, ValueError, "batch size of `features`, 1"),
        ({"target": T + 2}, ValueError, r"labels in \[0, 2\) or ignore_index -100, got 2"),
        ({"target": T - 1}, ValueError, "got -1"),
        ({"weight": torch.ones(3)}, ValueError, r"`weight` must have shape \(2,\)"),
        ({"weight": torch.ones(2, requires_grad=True)}, ValueError, "`weight` has no gradient"),
        ({"label_smoothing": 1.5}, ValueError, r"`label_smoothing` must be in \[0, 1\], got 1.5"),
        ({"reduction": "avg"}, ValueError, "`reduction` must be one of"),
        ({"bias": torch.ones(5)}, ValueError, "`bias` must have shape"),
    ],
)
def test_bad_input(change, error, words, backend):
    with pytest.raises(error, match=words):
        murf_fast.upsample_cross_entropy(**{"features": [X], "target": T, "backend": backend, **change})


LOSSES = {
    "plain": caller("none"),
    "weighted": caller("none", ignore_index=0, weighted=True, label_smoothing=0.1),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("case", for_triton((*SMALL_CASES[:2], SMALL_CASES[3], MANY_CLASSES), SUM_CASES), ids=str)
def test_triton(case, dtype, loss, device):
    check_parity(LOSSES[loss], case, dtype, "channels_last", "triton", device)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", for_triton((TINY_CASE, MANY_CLASSES), SUM_CASES), ids=str)
def test_triton_gradients(case, loss, device):
    check_gradients(LOSSES[loss], case, torch.float32, "channels_last", "triton", device)


@pytest.mark.parametrize("weighted", [False, True])
def test_triton_labels_out_of_range_give_nan(weighted, device):
    """CPU tensors are checked by the op; the kernel itself must neither read outside nor hide it."""
    from murf_fast import kernels
    from murf_fast.ops._library import axes_of_maps

    maps = [m.to(device) for m in make_maps(Case("labels", ((3, 1, 2),), (1, 5), batch=1))]
    target = torch.tensor([[[0, 3, -1, 2**40, 2]]], device=device)
    weight = torch.ones(3, device=device) if weighted else None
    out, lse = torch.empty(1, 1, 5, device=device), torch.empty(2, 1, 1, 5, device=device)
    axes = axes_of_maps(maps, (1, 5), "bilinear", False, None)
    kernels.upsample_cross_entropy(maps, axes, None, target, weight, -1, 0.0, out, lse)
    assert out.isnan().flatten().tolist() == [False, True, False, True, False]
    assert out[0, 0, 2] == 0
