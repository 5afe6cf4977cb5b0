"""The checks of addresses find a planted fault of every kind, and let right kernels pass."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from checked_memory import MemoryFault  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter")


@triton.jit
def _copy(x, out, n, SHIFT_X: tl.constexpr, SHIFT_OUT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out + at + SHIFT_OUT, tl.load(x + at + SHIFT_X, inside), inside)


@triton.jit
def _unmasked(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def _sum_to_one(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))))


@triton.jit
def _all_to_one(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at * 0, tl.load(x + at))


@triton.jit
def _neighbours(x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + (at + 1) % n))


@triton.jit
def _back(x, out, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + at, tl.load(out + BLOCK - 1 - at))


@triton.jit
def _cast(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x.to(tl.pointer_type(tl.int32)) + at).to(tl.float32))


X = torch.arange(16.0)


def test_a_right_kernel_passes():
    out = torch.zeros(13)
    _copy[(2,)](X, out, 13, 0, 0, 8)
    assert torch.equal(out, X[:13])


@pytest.mark.parametrize(
    ("what", "launch"),
    [
        ("loads outside", lambda: _unmasked[(3,)](X.clone(), torch.zeros(24), 8)),
        ("stores outside", lambda: _unmasked[(2,)](X, torch.zeros(8), 8)),
        ("loads 4 bytes that are no element", lambda: _copy[(1,)](X[:4], torch.zeros(8), 8, 0, 0, 8)),
        ("stores 4 bytes that are no element", lambda: _copy[(1,)](X, torch.zeros(16)[4:8], 8, 0, 0, 8)),
        ("no element", lambda: _copy[(1,)](X[::2], torch.zeros(8), 8, 0, 0, 8)),
        ("no element", lambda: _cast[(1,)](X.double(), torch.zeros(8), 8)),
        ("has stored", lambda: _sum_to_one[(2,)](X, torch.zeros(1), 8)),
        ("two values", lambda: _all_to_one[(1,)](X, torch.zeros(1), 8)),
        ("has (stored|loaded)", lambda: _neighbours[(2,)](X.clone(), 16, 8)),
        ("without a barrier", lambda: _back[(1,)](X.clone(), torch.zeros(8), 8, False)),
    ],
)
def test_a_wrong_kernel_is_found(what, launch):
    with pytest.raises(MemoryFault, match=what):
        launch()


def test_a_barrier_makes_own_stores_readable():
    x, out = X.clone(), torch.zeros(8)
    _back[(1,)](x, out, 8, True)
    assert torch.equal(x[:8], X[:8].flip(0))
