from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from suite import (
    DTYPES,
    LAYOUTS,
    MANY_CLASSES,
    SMALL_CASES,
    SUM_CASES,
    TRITON_DTYPES,
    Case,
    by_name,
    check_deterministic_across_threads,
    check_opcheck,
    for_triton,
    make_maps,
)
from test_upsample_sum import bias_for
from util import assert_labels_within_budget, assert_within_budget

import murf_fast


def call(maps, case, backend):
    return murf_fast.upsample_argmax(
        maps, case.size, bias=bias_for(case, True, maps[0].dtype).to(maps[0].device), **case.resize, backend=backend
    )


def check_labels(case, dtype, layout, backend="native", device="cpu"):
    """Labels equal float64's wherever its margin exceeds the error budget; elsewhere the chosen logit is as good."""
    maps = [m.to(device) for m in make_maps(case, dtype, layout)]
    bias = bias_for(case, True, dtype).to(device)
    arguments = {"bias": bias, **case.resize, "return_values": True}
    labels, values = murf_fast.upsample_argmax(maps, case.size, **arguments, backend=backend)
    double = [m.double() for m in maps]
    logits = murf_fast.upsample_sum(double, case.size, bias=bias.double(), **case.resize)
    _, same_dtype = murf_fast.upsample_argmax(maps, case.size, **arguments, backend="reference")
    best = logits.amax(1)
    assert_within_budget(values, best, same_dtype, "values")
    # Logits are not rounded to the maps' dtype before they are compared: the arithmetic is float32.
    single = murf_fast.upsample_sum([m.float() for m in maps], case.size, bias=bias.float(), **case.resize,
                                    backend="reference")  # fmt: skip
    assert_labels_within_budget(labels, logits, single)
    alone = murf_fast.upsample_argmax(maps, case.size, bias=bias, **case.resize, backend="native")
    assert torch.equal(alone, labels)
    return labels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [c for c in SUM_CASES if c.batch], ids=str)
def test_parity(case, layout, dtype):
    check_labels(case, dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level(level, dtype):
    for case in SUM_CASES:
        if case.batch:
            check_labels(case, dtype, "channels_last")


@given(
    classes=st.integers(1, 70),
    grids=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    mode=st.sampled_from(["bilinear", "bicubic", "area", "nearest"]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(classes, grids, size, mode):
    check_labels(Case("drawn", tuple((classes, *g) for g in grids), size, mode), torch.float32, "channels_last")


@pytest.mark.parametrize(
    ("classes", "dtype"), [(256, torch.uint8), (257, torch.int16), (32768, torch.int16), (32769, torch.int32)]
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_smallest_label_type(backend, classes, dtype):
    x = torch.zeros(1, classes, 2, 1)
    x[:, classes - 1] = 1
    labels = murf_fast.upsample_argmax([x], (3, 2), backend=backend)
    assert labels.dtype == dtype
    assert (labels.long() == classes - 1).all()


@pytest.mark.parametrize("classes", [1, 5, 16, 17, 40])
def test_ties_go_to_the_lower_class(level, classes):
    for value in (0.0, 3.5, -torch.inf):
        x = torch.full((1, classes, 3, 3), value)
        assert not murf_fast.upsample_argmax([x], (3, 3)).any()
    x = torch.zeros(1, 40, 2, 2)
    x[:, [9, 25, 38]] = 1
    assert (murf_fast.upsample_argmax([x], (4, 4)) == 9).all()


def test_nan_beats_everything_as_in_torch(level):
    x = torch.randn(1, 37, 1, 1).repeat(1, 1, 4, 4)
    x[0, 20, 1], x[0, 4, 2], x[0, 33, 2], x[0, 0, 3] = torch.nan, torch.nan, torch.nan, torch.nan
    x[0, 2, 1] = torch.inf
    labels, values = murf_fast.upsample_argmax([x], (4, 4), return_values=True)
    assert torch.equal(labels.long(), x.argmax(1))
    assert torch.equal(values.isnan(), x.isnan().any(1))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_registration(layout):
    maps = make_maps(SUM_CASES[0], layout=layout)
    bias = bias_for(SUM_CASES[0], True, torch.float32)
    op = torch.ops.murf_fast.upsample_argmax.default
    check_opcheck(op, maps, bias, [11, 13], "bilinear", False, None, True, "native")
    check_opcheck(op, maps, None, [11, 13], "bicubic", False, [4, 5], False, "native")


def test_inputs_that_want_gradients():
    maps = [m.requires_grad_() for m in make_maps(SUM_CASES[0])]
    assert not murf_fast.upsample_argmax(maps, (11, 13)).requires_grad
    with pytest.raises(ValueError, match=r"`return_values=True` has no gradient"):
        murf_fast.upsample_argmax(maps, (11, 13), return_values=True)


def test_compile():
    case = SUM_CASES[0]
    maps = make_maps(case)
    torch.compiler.reset()
    compiled = torch.compile(lambda *m: call([x * 2 for x in m], case, "native") + 1, fullgraph=True)
    assert torch.equal(compiled(*maps), call([m * 2 for m in maps], case, "native") + 1)


def test_threads():
    check_deterministic_across_threads(call, by_name(SUM_CASES, ("many_rows",))[0])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"features": [torch.ones(1, 2, 3, 4), torch.ones(1, 5, 3, 4)]}, ValueError, "channels of .* 2, got 5"),
        ({"features": [torch.ones(1, 2, 3, 4).long()]}, TypeError, "int64"),
        ({"bias": torch.ones(2, 2)}, ValueError, r"got \(2, 2\)"),
        ({"size": (3, 0)}, ValueError, "`size` must be positive"),
        ({"mode": "cubic"}, ValueError, "`mode`"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"features": [torch.ones(1, 2, 3, 4)], "size": (5, 6), **change}
    with pytest.raises(error, match=words):
        murf_fast.upsample_argmax(**arguments)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("layout", for_triton(["channels_last"], ["contiguous", "sliced"]))
@pytest.mark.parametrize("case", for_triton((*SMALL_CASES[:2], SMALL_CASES[3], MANY_CLASSES), SUM_CASES), ids=str)
def test_triton(case, layout, dtype, device):
    check_labels(case, dtype, layout, "triton", device)


@pytest.mark.parametrize(("classes", "dtype"), [(3, torch.uint8), (131, torch.uint8), (300, torch.int16)])
def test_triton_ties_nan_and_label_types(classes, dtype, device):
    row = torch.zeros(1, classes, 1, 4)
    row[0, 1, 0, 1] = row[0, -1, 0, 1] = 2
    row[0, -2:, 0, 2] = torch.nan
    row[0, 0, 0, 2] = torch.inf
    row[..., 3] = -torch.inf
    labels = murf_fast.upsample_argmax([row.to(device)], (1, 4), backend="triton")
    assert labels.dtype == dtype
    assert labels.flatten().tolist() == [0, 1, classes - 2, 0]
    assert labels.flatten().tolist() == row.argmax(1).flatten().tolist()
