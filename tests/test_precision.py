"""Digits that a careless order of operations loses: of large logits, of logits beside a floor, beside a large bias."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from util import assert_gradient_within_budget, assert_within_budget

import murf_fast as mf

BACKENDS = ("native", "triton")


def logits(offset: float, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(2, 19, 4, 5, generator=torch.Generator().manual_seed(seed)) + offset


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5, -1e5, 1e7])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_entropy_of_logits_with_a_common_offset(backend, offset, weighted, smoothing):
    """On one grid the resize is exact, and what is left is the softmax."""
    x = logits(offset)
    target = torch.randint(0, 19, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    weight = torch.linspace(0.5, 2, 19) if weighted else None

    def both(x, call):
        x = x.clone().requires_grad_()
        loss = call(x)
        return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]

    def ours(x):
        options = {"weight": weight, "label_smoothing": smoothing, "reduction": "none", "backend": backend}
        return mf.upsample_cross_entropy([x], target, **options)

    def theirs(x):
        options = {"weight": None if weight is None else weight.to(x.dtype), "label_smoothing": smoothing}
        return F.cross_entropy(x, target, reduction="none", **options)

    actual, same_dtype, oracle = both(x, ours), both(x, theirs), both(x.double(), theirs)
    # A loss with smoothing is a sum of terms as large as the range of the logits.
    assert_within_budget(actual[0], oracle[0], same_dtype[0], "loss", terms=20.0 if smoothing else 0.0)
    assert_gradient_within_budget(actual[1], oracle[1], same_dtype[1])


@pytest.mark.parametrize("size", [1e-9, 1e-12, 1e-30, 0.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_slope_of_the_linear_norm_beside_its_floor(backend, size):
    """Logits that vanish beside the floor of 0.1 still have the slope of their sign; that of zero is zero."""
    signs = torch.randint(-1, 2, (2, 7, 3, 4), generator=torch.Generator().manual_seed(0)).float()
    values = torch.linspace(1, 5, 7)

    def gradient(dtype, backend):
        x = (size * signs).to(dtype).requires_grad_()
        result = mf.upsample_expectation([x], (3, 4), values.to(dtype), norm="linear", backend=backend)
        return torch.autograd.grad(result.sum(), x)[0]

    expected = gradient(torch.float64, None)
    assert bool(expected.any()) == (size > 0)
    assert_gradient_within_budget(gradient(torch.float32, backend), expected, gradient(torch.float32, "reference"))


# Triton's interpreter multiplies bfloat16 matrices wrongly.
@pytest.mark.parametrize(
    ("backend", "dtype"), [("native", torch.float32), ("native", torch.bfloat16), ("triton", torch.float32)]
)
@pytest.mark.parametrize("offset", [1e3, 1e5, 1e7])
def test_a_large_bias_is_added_last(backend, offset, dtype):
    """One rounding to the digits of the bias, as in the reference: one step of its size, however many taps."""
    generator = torch.Generator().manual_seed(0)
    source, kernels = torch.randn(1, 5, 8, 9, generator=generator), torch.randn(1, 49, 11, 12, generator=generator)
    source, bias = source.to(dtype), offset * torch.linspace(1, 2, 5)
    actual = mf.adaptive_conv(source, kernels, bias=bias, backend=backend)
    exact = mf.adaptive_conv(source.double(), kernels.double(), bias=bias.double())
    plain = mf.adaptive_conv(source.float(), kernels, backend="reference")
    own = (plain.double() - (exact - bias.double().view(1, -1, 1, 1))).abs().max()
    # Half a step of the sum in float32, and for a half result half a step of that.
    steps = sum(torch.finfo(d).eps / 2 for d in {torch.float32, dtype})
    assert float((actual.double() - exact).abs().max()) <= 2 * float(own) + steps * float(exact.abs().max())


@pytest.mark.parametrize("shape", [(700, 1), (1, 700)], ids=str)
@pytest.mark.parametrize("backend", ["triton"])
def test_a_mean_of_many_pixels(backend, shape):
    """Float32 terms one by one are off by 72 units in the last place here, and in the fifth digit for thousands."""
    result = mf.resize(torch.ones(1, 1, *shape), (1, 1), mode="area", backend=backend)
    assert abs(float(result) - 1) <= 8 * torch.finfo(torch.float32).eps


def test_tf32_where_torch_allows_it():
    """By its older switch, and by its newer one, after which torch refuses to read the older."""
    launch = pytest.importorskip("murf_fast.kernels.launch")
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        for precision, expected in (("high", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(precision)
            assert launch.dot_precision() == expected
            assert launch.dot_precision(in_parts=True) == expected.replace("ieee", "tf32x3")
        if hasattr(matmul, "fp32_precision"):
            for precision in ("tf32", "ieee"):
                matmul.fp32_precision = precision
                assert launch.dot_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
