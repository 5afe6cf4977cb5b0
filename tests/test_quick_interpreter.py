"""Triton's interpreter without what it repeats: it computes the same, and leaves the language as it was."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from quick_interpreter import ORIGINALS  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter")


@triton.jit
def _squared(x):
    return x * x


@triton.jit
def _sum_of_squares(out, x, n, N: tl.constexpr):
    """A loop of calls, a reduction and a cast."""
    total = tl.zeros((N,), tl.float32)
    i = 0
    while i < n:
        total += _squared(tl.load(x + i * N + tl.arange(0, N)).to(tl.float32))
        i += 1
    tl.store(out, tl.sum(total, axis=0))


@triton.jit
def _some(out, n, limit, begin, N: tl.constexpr):
    i = tl.arange(0, N)
    mask = (i < n) & (begin < limit)
    tl.static_assert(mask.dtype == tl.int1)
    tl.store(out + i, 1.0, mask=mask)


def language() -> dict[tuple[object, str], object]:
    return {(owner, name): getattr(owner, name) for owner in (tl, tl.tensor, tl.math) for name in dir(owner)}


def test_a_launch_computes_and_leaves_the_language_as_it_was():
    before = language()
    for dtype in (torch.float16, torch.float32, torch.int64):
        x, out = torch.arange(24).to(dtype).view(3, 8), torch.zeros(1)
        _sum_of_squares[(1,)](out, x, 3, 8)
        assert out.item() == (x.double() ** 2).sum().item()
        assert language() == before


def test_a_launch_that_fails_does_so():
    before = language()
    with pytest.raises(interpreter.InterpreterError):
        _sum_of_squares[(1,)](torch.zeros(1), torch.zeros(8), "three", 8)
    assert language() == before


def test_calls_within_a_launch_replace_nothing(monkeypatch):
    replaced = []
    replace = interpreter._patch_attr
    monkeypatch.setattr(interpreter, "_patch_attr", lambda *a: replaced.append(a[1]) or replace(*a))
    found = []
    for n in (0, 1, 3):
        replaced.clear()
        _sum_of_squares[(1,)](torch.zeros(1), torch.zeros(3, 8), n, 8)
        found.append(len(replaced))
    assert found[0] == found[1] == found[2] > 100


def test_dtypes_are_those_of_the_interpreter():
    original = ORIGINALS["_get_np_dtype"]
    for dtype in (tl.int1, tl.int8, tl.uint16, tl.int64, tl.float16, tl.bfloat16, tl.float32, tl.float64, tl.float8e5):
        for one in (
            dtype,
            tl.block_type(dtype, [4]),
            tl.pointer_type(dtype),
            tl.block_type(tl.pointer_type(dtype), [4]),
        ):
            assert interpreter._get_np_dtype(one) == original(one)
    assert interpreter._get_np_dtype is not original


def test_a_scalar_comparison_masks_by_truth_values(monkeypatch):
    """Triton 3.9 refuses other masks, and to the interpreter of every version they would be int32."""
    masks = []
    store = interpreter.InterpreterBuilder.create_masked_store

    def seen(self, pointers, value, mask, *others):
        masks.append(mask.data.dtype)
        return store(self, pointers, value, mask, *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", seen)
    for begin, expected in ((2, [1, 1, 1, 0]), (3, [0, 0, 0, 0])):
        out = torch.zeros(4)
        _some[(1,)](out, 3, 3, begin, 4)
        assert out.tolist() == expected
    assert masks == [torch.zeros(0, dtype=torch.bool).numpy().dtype] * 2
