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
    check_opcheck,
    for_triton,
    make_maps,
)
from test_upsample_sum import bias_for
from util import assert_labels_within_budget

import murf_fast

LABEL_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
IGNORED = 100


def target_for(case: Case, maps, ignored: float = 0.3, dtype=torch.int64):
    generator = torch.Generator().manual_seed(7)
    shape = (len(maps[0]), *case.size)
    target = torch.randint(0, min(maps[0].shape[1], 100), shape, generator=generator)
    target[torch.rand(shape, generator=generator) < ignored] = IGNORED
    return target.to(dtype)


def counted(labels, target, classes):
    """The matrix of labels, pixel by pixel in Python."""
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for t, p in zip(target.flatten().tolist(), labels.flatten().tolist(), strict=True):
        if t != IGNORED:
            counts[t, p] += 1
    return counts


def check_counts(case, dtype, layout, backend="native", device="cpu"):
    """The counts of the labels that ``upsample_argmax`` gives, which are held against float64."""
    maps = [m.to(device) for m in make_maps(case, dtype, layout)]
    if maps[0].shape[1] > IGNORED:
        return check_ignored_is_a_class(case, maps, backend)
    bias, target = bias_for(case, True, dtype).to(device), target_for(case, maps).to(device)
    options = {"bias": bias, **case.resize, "backend": backend}
    counts = murf_fast.upsample_confusion(maps, target, ignore_index=IGNORED, **options)
    labels = murf_fast.upsample_argmax(maps, case.size, **options)
    assert counts.dtype == torch.int64
    assert torch.equal(counts.cpu(), counted(labels, target, maps[0].shape[1]))
    return counts


def check_ignored_is_a_class(case, maps, backend):
    """With as many classes, the ignored label is one of them, and its row stays empty."""
    target = target_for(case, maps).to(maps[0].device)
    counts = murf_fast.upsample_confusion(maps, target, ignore_index=IGNORED, **case.resize, backend=backend)
    labels = murf_fast.upsample_argmax(maps, case.size, **case.resize, backend=backend)
    assert torch.equal(counts.cpu(), counted(labels, target, maps[0].shape[1]))
    assert not counts[IGNORED].any()
    return counts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [c for c in SUM_CASES if c.batch], ids=str)
def test_counts_of_the_labels(case, layout, dtype):
    check_counts(case, dtype, layout)


def test_labels_are_those_of_float64():
    """Logits that are far apart have one right class in every precision."""
    x = torch.randn(2, 7, 5, 6).mul(3)
    size = (23, 31)
    target = torch.randint(0, 7, (2, *size))
    logits = torch.nn.functional.interpolate(x.double(), size, mode="bilinear")
    expected = torch.bincount((target * 7 + logits.argmax(1)).flatten(), minlength=49).view(7, 7)
    counts = murf_fast.upsample_confusion([x], target)
    labels = murf_fast.upsample_argmax([x], size)
    assert_labels_within_budget(labels, logits, torch.nn.functional.interpolate(x, size, mode="bilinear"))
    assert int((counts - expected).abs().sum()) <= 2 * int((labels != logits.argmax(1)).sum())
    assert torch.equal(counts.sum(1), torch.bincount(target.flatten(), minlength=7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level(level, dtype):
    for case in SUM_CASES:
        if case.batch:
            check_counts(case, dtype, "channels_last")


@given(
    classes=st.integers(1, 70),
    grids=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    mode=st.sampled_from(["bilinear", "bicubic", "area", "nearest"]),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(classes, grids, size, mode):
    check_counts(Case("drawn", tuple((classes, *g) for g in grids), size, mode), torch.float32, "channels_last")


@pytest.mark.parametrize("backend", ["native", "reference", "triton"])
@pytest.mark.parametrize("dtype", LABEL_TYPES, ids=str)
def test_every_type_of_labels(dtype, backend, device):
    if backend != "triton":
        device = "cpu"
    case = SMALL_CASES[0]
    maps = [m.to(device) for m in make_maps(case)]
    target = target_for(case, maps, dtype=dtype).to(device)
    whole = murf_fast.upsample_confusion(maps, target.long(), ignore_index=IGNORED, backend=backend)
    assert torch.equal(murf_fast.upsample_confusion(maps, target, ignore_index=IGNORED, backend=backend), whole)
    strided = target.mT.contiguous().mT
    assert torch.equal(murf_fast.upsample_confusion(maps, strided, ignore_index=IGNORED, backend=backend), whole)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_small_type_does_not_wrap_the_ignored_label(backend):
    """156 as an unsigned byte is -100 as a signed one, the label that is ignored unless told otherwise."""
    x = torch.randn(1, 200, 2, 2)
    target = torch.full((1, 4, 4), 156, dtype=torch.uint8)
    assert int(murf_fast.upsample_confusion([x], target, backend=backend)[156].sum()) == 16


def test_matrices_of_images_add_up():
    case = by_name(SUM_CASES, ("many_rows",))[0]
    maps = make_maps(case)
    target = target_for(case, maps)
    whole = murf_fast.upsample_confusion(maps, target, ignore_index=IGNORED)
    alone = [
        murf_fast.upsample_confusion([m[i : i + 1] for m in maps], target[i : i + 1], ignore_index=IGNORED)
        for i in range(len(target))
    ]
    assert torch.equal(torch.stack(alone).sum(0), whole)


def test_nan_and_ties_as_in_argmax(level):
    x = torch.zeros(1, 37, 2, 2)
    x[0, 20, 0, 0] = torch.nan
    target = torch.zeros(1, 2, 2, dtype=torch.int64)
    counts = murf_fast.upsample_confusion([x], target)
    assert counts[0, 20] == 1
    assert counts[0, 0] == 3


@pytest.mark.parametrize("backend", ["native", "reference", "triton"])
@pytest.mark.parametrize("label", [3, -1, 255])
def test_labels_out_of_range(label, backend, device):
    x = torch.randn(1, 3, 2, 2)
    target = torch.ones(1, 4, 4, dtype=torch.int64)
    target[0, 2, 1] = label
    if backend == "triton" and device != "cpu":
        counts = murf_fast.upsample_confusion([x.to(device)], target.to(device), backend=backend)
        assert int(counts.sum()) == 15  # not looked at, not counted
        return
    words = rf"`target` must hold labels in \[0, 3\) or ignore_index -100, got {label}"
    with pytest.raises(ValueError, match=words):
        murf_fast.upsample_confusion([x], target, backend=backend)
    target[0, 2, 1] = 1
    counts = murf_fast.upsample_confusion([x], target, ignore_index=1, backend=backend)
    assert not counts.any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_registration(layout):
    maps = make_maps(SUM_CASES[0], layout=layout)
    bias, target = bias_for(SUM_CASES[0], True, torch.float32), target_for(SUM_CASES[0], maps)
    op = torch.ops.murf_fast.upsample_confusion.default
    check_opcheck(op, maps, bias, target, "bilinear", False, None, IGNORED, "native")
    check_opcheck(op, maps, None, target, "bicubic", False, [4, 5], IGNORED, "native")


def test_inputs_that_want_gradients():
    maps = [m.requires_grad_() for m in make_maps(SUM_CASES[0])]
    assert not murf_fast.upsample_confusion(maps, target_for(SUM_CASES[0], maps, 0)).requires_grad


def test_compile():
    maps = make_maps(SUM_CASES[0])
    target = target_for(SUM_CASES[0], maps, 0)
    torch.compiler.reset()
    compiled = torch.compile(lambda *m: murf_fast.upsample_confusion([x * 2 for x in m], target) + 1, fullgraph=True)
    assert torch.equal(compiled(*maps), murf_fast.upsample_confusion([m * 2 for m in maps], target) + 1)


def test_threads():
    case = by_name(SUM_CASES, ("many_rows",))[0]
    maps = make_maps(case)
    target, before, found = target_for(case, maps), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(murf_fast.upsample_confusion(maps, target, ignore_index=IGNORED))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"features": [torch.ones(1, 2, 3, 4), torch.ones(1, 5, 3, 4)]}, ValueError, "channels of .* 2, got 5"),
        ({"features": [torch.ones(1, 2, 3, 4).long()]}, TypeError, "int64"),
        ({"bias": torch.ones(2, 2)}, ValueError, r"got \(2, 2\)"),
        ({"target": torch.zeros(1, 5, 6)}, TypeError, "`target` must be an integer tensor"),
        ({"target": torch.zeros(2, 5, 6).long()}, ValueError, "batch size of `features`, 1"),
        ({"ignore_index": 1.5}, TypeError, "`ignore_index`"),
        ({"mode": "cubic"}, ValueError, "`mode`"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"features": [torch.ones(1, 2, 3, 4)], "target": torch.zeros(1, 5, 6).long(), **change}
    with pytest.raises(error, match=words):
        murf_fast.upsample_confusion(**arguments)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("layout", for_triton(["channels_last"], ["contiguous", "sliced"]))
@pytest.mark.parametrize("case", for_triton((*SMALL_CASES[:2], MANY_CLASSES), SUM_CASES), ids=str)
def test_triton(case, layout, dtype, device):
    counts = check_counts(case, dtype, layout, "triton", device)
    if dtype == torch.float32:
        assert int(counts.sum()) == int(check_counts(case, dtype, layout).sum())
