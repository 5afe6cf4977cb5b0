"""Tensors of several dtypes in one call: one rule for all ops, which the documentation of murf_fast.ops states."""

from __future__ import annotations

import pytest
import torch
from every_op import OPS, Op
from torch import Tensor
from util import assert_within_budget

import murf_fast as mf

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CASES = [(op, name) for op in OPS for name in op.companions]


def result_dtype(op: Op, main: torch.dtype, companion: str, dtype: torch.dtype) -> torch.dtype | None:
    """That of the main tensors, but for results in another unit; None for labels and indices."""
    if op.name in ("upsample_argmax", "upsample_confusion", "window_attention_argmax", "k_center_greedy"):
        return None
    if op.name.startswith("upsample_expectation"):
        return torch.promote_types(
            main, dtype if companion == "values" else torch.float32 if main.itemsize < 8 else main
        )
    if op.name == "upsample_cross_entropy":
        return torch.promote_types(main, torch.float32)
    if op.name == "nearest_distance":
        return torch.promote_types(torch.promote_types(main, dtype), torch.float32)
    return main


def cast(tensors: dict[str, Tensor], dtype: torch.dtype, names=None) -> dict[str, Tensor]:
    return {
        n: t.to(dtype) if t.is_floating_point() and (names is None or n in names) else t for n, t in tensors.items()
    }


@pytest.mark.parametrize("main", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "companion"), CASES, ids=[f"{op}-{name}" for op, name in CASES])
def test_a_companion_of_any_dtype_is_taken_at_its_value(op, companion, main):
    for dtype in DTYPES:
        others = [n for n in op.companions if n not in op.large]
        tensors = cast(op.tensors(), torch.float32, others)
        tensors = cast(cast(tensors, main, (*op.main, *op.large)), dtype, (companion,))
        if companion in op.large and dtype != main and (dtype != torch.float32 or main == torch.float64):
            with pytest.raises(TypeError, match=f"`{companion}` must"):
                op.call(tensors)
            continue
        actual = op.call(tensors)
        oracle = op.call(cast(tensors, torch.float64))
        expected = result_dtype(op, main, companion, dtype)
        if expected is None:
            assert torch.equal(actual, oracle)
            continue
        assert actual.dtype == expected, f"{companion} in {dtype}"
        arithmetic = main if op.products else torch.promote_types(expected, torch.float32)
        same_dtype = op.call(cast(tensors, arithmetic), backend="reference")
        assert_within_budget(actual, oracle, same_dtype, f"{op}: {companion} in {dtype}")


@pytest.mark.parametrize(("op", "companion"), CASES, ids=[f"{op}-{name}" for op, name in CASES])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64], ids=str)
def test_a_companion_that_is_no_real_number_is_refused(op, companion, dtype):
    tensors = op.tensors()
    with pytest.raises(TypeError, match=r"murf_fast\."):
        op.call(tensors | {companion: tensors[companion].to(dtype)})


def test_an_average_is_rounded_once():
    large = [torch.full((1, 1, 2, 3), 60000.0, dtype=torch.float16)] * 2
    assert torch.equal(mf.upsample_mean(large, (3, 5), [3.0, -2.0]), torch.full((1, 1, 3, 5), 60000.0).half())
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 1, 4, 5, generator=generator).bfloat16() for _ in range(15)]
    exact = mf.upsample_mean([m.double() for m in maps], (9, 7))
    for weights in (None, [1.0] * 15, torch.ones(15, dtype=torch.bfloat16), torch.ones(15, dtype=torch.float64)):
        for backend in ("native", "reference"):
            actual = mf.upsample_mean(maps, (9, 7), weights, backend=backend)
            assert_within_budget(actual, exact, exact)
            out = torch.empty(1, 1, 9, 7, dtype=torch.bfloat16)
            assert torch.equal(mf.upsample_mean(maps, (9, 7), weights, out=out, backend=backend), actual)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("features", [torch.float32, torch.float64], ids=str)
def test_small_label_types_are_compared_as_integers(dtype, features):
    """257 classes are one more than uint8 has values, and 255 is none of int8."""
    logits = [torch.randn(1, 257, 3, 4, generator=torch.Generator().manual_seed(0)).to(features)]
    target = torch.randint(0, 100, (1, 5, 6), generator=torch.Generator().manual_seed(1))
    for ignore_index in (-100, 255, 300):
        expected = mf.upsample_cross_entropy(logits, target, ignore_index=ignore_index)
        actual = mf.upsample_cross_entropy(logits, target.to(dtype), ignore_index=ignore_index)
        assert torch.equal(actual, expected)


def test_double_queries_on_an_index_of_single_rows():
    query, bank = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 3)
    for index in (mf.NearestIndex(bank), mf.NearestIndex(bank, precision="bfloat16")):
        distances, indices = mf.nearest_distance(query, index, k=2)
        expected = torch.cdist(query, bank.double()).topk(2, largest=False)
        assert distances.dtype == torch.float64
        assert torch.equal(indices, expected.indices)
        torch.testing.assert_close(distances, expected.values)
