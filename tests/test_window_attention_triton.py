"""The Triton kernels of window attention against the float64 reference, in the interpreter or on the GPU."""

from __future__ import annotations

import pytest
import torch
from test_window_attention import CASES, Case, double, gradients, inputs
from test_window_attention import call as attention
from util import assert_within_budget

pytest.importorskip("triton")

from murf_fast import backends, windows

HAS_GPU = torch.cuda.is_available()
DEVICE = pytest.param("cuda", marks=pytest.mark.gpu) if HAS_GPU else "cpu"
REASONS = backends.reasons_against("triton", "cuda" if HAS_GPU else "cpu")
pytestmark = [
    pytest.mark.parametrize("device", [DEVICE]),
    pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS)),
]
# The interpreter computes half precision with NumPy, which has no bfloat16.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else []))
REPEATED = torch.tensor([[0, 0, 2], [1, 1, 1]], dtype=torch.int32)
SMALL = (
    Case("ratio", windows.ratio((7, 5), (4, 3), 0.2), (7, 5), (4, 3), channels=19),
    Case("shifted", windows.neighborhood((5, 4), (5, 4), 3), (5, 4), (5, 4), head_dim=17, batch=1, bias=True),
    Case("fraction", windows.neighborhood((7, 8), (3, 3), 2), (7, 8), (3, 3), batch=1),
    Case("repeated", windows.tables(REPEATED, REPEATED, (3, 3)), (2, 2), (3, 3), batch=1),
    Case("wide", windows.full(), (2, 3), (3, 18), heads=1, batch=1, channels=3),
)
SHAPES = (*SMALL, *(c for c in CASES if c.batch)) if HAS_GPU else SMALL


def on(tensors, device):
    return [t.to(device) for t in tensors]


@pytest.mark.parametrize("values", ["mean", "split"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"] if HAS_GPU else ["channels_last"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_parity(case, layout, dtype, values, device):
    tensors = on(inputs(case, values, dtype, layout), device)
    oracles = attention(double(tensors), case, values, "reference", True)
    same = attention(tensors, case, values, "reference", True)
    for name, a, o, s in zip(
        ("out", "lse"), attention(tensors, case, values, "triton", True), oracles, same, strict=True
    ):
        assert_within_budget(a, o, s, f"{case}: {name}")


@pytest.mark.parametrize("values", ["mean", "split"])
@pytest.mark.parametrize("dtype", DTYPES if HAS_GPU else [torch.float32], ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_gradients(case, dtype, values, device):
    tensors = on(inputs(case, values, dtype), device)
    oracle, same = (gradients(t, case, values, "reference") for t in (double(tensors), tensors))
    # One rounding of the largest score is so many roundings of a weight, whichever way its exponential is computed.
    score = attention(double(tensors), case, values, "reference", True)[1].abs().max()
    for i, (a, o, s) in enumerate(zip(gradients(tensors, case, values, "triton"), oracle, same, strict=True)):
        if o.norm() > 1e-9 * o.numel():
            assert_within_budget(a, o, s, f"{case}: gradient {i}", terms=float(score * o.abs().max()))
            norm = o.norm()
            assert (a.double() - o).norm() <= 2 * (s.double() - o).norm() + torch.finfo(dtype).eps * norm
