"""Products of TF32 parts have the digits of float32."""

from __future__ import annotations

import pytest
import torch
from util import assert_within_budget

pytest.importorskip("triton")

import triton
import triton.language as tl

from murf_fast.kernels.products import product

SIZE = 32


@triton.jit
def _multiply(a, b, out, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    tl.store(out + at, product(tl.load(a + at), tl.load(b + at), total, PRECISION))


def operands(kind: str, seed: int) -> torch.Tensor:
    x = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return {"normal": x, "positive": x.abs(), "half": x.half(), "bias": 1000 + x}[kind]


def multiplied(a: torch.Tensor, b: torch.Tensor, precision: str, device: str) -> torch.Tensor:
    out = torch.empty(SIZE, SIZE, device=device)
    _multiply[(1,)](a.to(device), b.to(device), out, SIZE=SIZE, PRECISION=precision)
    return out.cpu()


@pytest.mark.parametrize("kinds", [("normal", "normal"), ("positive", "positive"), ("half", "normal"),
                                   ("normal", "half"), ("half", "half"), ("bias", "normal")], ids=str)  # fmt: skip
def test_digits_of_float32(kinds, device):
    a, b = (operands(kind, seed) for seed, kind in enumerate(kinds))
    oracle, same = a.double() @ b.double(), a.float() @ b.float()
    assert_within_budget(multiplied(a, b, "ieee", device), oracle, same)
    if kinds != ("half", "half"):
        with pytest.raises(AssertionError):
            assert_within_budget(multiplied(a, b, "tf32", device), oracle, same)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_sizes(factor, device):
    """Powers of two that leave room for what lies below the digits of TF32."""
    a, b = factor * operands("normal", 0), operands("normal", 1)
    assert_within_budget(multiplied(a, b, "ieee", device), a.double() @ b.double(), a @ b)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_an_infinite_operand_is_not_lost(device):
    a, b = operands("normal", 0), operands("normal", 1)
    a[3, 4] = torch.inf
    finite = multiplied(a, b, "ieee", device).isfinite()
    assert not finite[3].any()
    assert finite[torch.arange(SIZE) != 3].all()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -1], ids=hex)
def test_no_nan_is_lost(bits, precision, device):
    """Whatever its bits: those of a GPU's NaN are all set."""
    a, b = operands("normal", 0), operands("normal", 1)
    a.view(torch.int32)[3, 4] = bits
    missing = multiplied(a, b, precision, device).isnan()
    assert missing[3].all()
    assert not missing[torch.arange(SIZE) != 3].any()
