"""Attention of a grid to itself: outputs of NATTEN, parity and gradients through the engine, bad input."""

from __future__ import annotations

import originals
import pytest
import torch
from suite import DTYPES, for_triton
from util import assert_gradient_within_budget, assert_within_budget

import murf_fast
from murf_fast import BackendUnavailableError

OPTIONS = (
    {"kernel_size": 3},
    {"kernel_size": (5, 3), "stride": (2, 1)},
    {"kernel_size": (3, 2), "dilation": (2, 3), "scale": 0.3},
    {"kernel_size": (9, 8)},
)


def inputs(dtype, batch=2, height=9, width=8):
    generator = torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    q, k, v = (randn(batch, height, width, 3, channels) for channels in (5, 5, 7))
    return [q, k, v, randn(3, height, height), randn(3, width, width)]


def call(tensors, options, backend):
    q, k, v, *bias = tensors
    return murf_fast.neighborhood_attention(q, k, v, bias=tuple(bias) or None, **options, backend=backend)


@pytest.mark.parametrize("case", [0, 1, 2])
def test_golden(case, level):
    data = {k: torch.from_numpy(v) for k, v in originals.golden(f"na2d_{case}").items()}
    sizes = {name: tuple(data[name].tolist()) for name in ("kernel_size", "stride", "dilation")}
    out = murf_fast.neighborhood_attention(data["q"], data["k"], data["v"], **sizes)
    assert (out - data["output"]).abs().max() <= 3e-6


def check(tensors, options, backend):
    dtype = tensors[0].dtype

    def everything(tensors, backend):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = call(leaves, options, backend)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, dtype)
        return out, *torch.autograd.grad(out, leaves, direction.to(out.dtype))

    oracle, same = everything([t.double() for t in tensors], "reference"), everything(tensors, "reference")
    actual = everything(tensors, backend)
    assert actual[0].dtype == dtype
    assert_within_budget(actual[0], oracle[0], same[0])
    for a, o, s in zip(actual[1:], oracle[1:], same[1:], strict=True):
        assert_gradient_within_budget(a, o, s)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parity_and_gradients(options, dtype):
    check(inputs(dtype), options, "native")


def test_triton(device):
    """The kernels are those of window attention, which has the shapes; a GPU affords the options of this test, too."""
    check([t.to(device) for t in inputs(torch.float32, 1, 4, 3)], {"kernel_size": (3, 2), "dilation": (1, 1)}, "triton")
    for options in for_triton([], OPTIONS):
        check([t.to(device) for t in inputs(torch.float32)], options, "triton")


def test_slopes_are_tables_of_distances():
    q, k, v, *_ = inputs(torch.float32)
    slopes = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    distances = [(torch.arange(n)[:, None] - torch.arange(n)).abs() for n in (9, 8)]
    tables = [-s.detach()[:, None, None] * d for s, d in zip(slopes, distances, strict=True)]
    leaves = [t.requires_grad_() for t in tables]
    out = murf_fast.neighborhood_attention(q, k, v, kernel_size=3, bias=slopes)
    same = murf_fast.neighborhood_attention(q, k, v, kernel_size=3, bias=tuple(leaves))
    assert torch.equal(out, same)
    by_slope, by_table = (torch.autograd.grad(o.square().sum(), x) for o, x in ((out, slopes), (same, leaves)))
    for s, t, d in zip(by_slope, by_table, distances, strict=True):
        torch.testing.assert_close(s, -(t * d).sum((1, 2)))


def test_reference_is_the_engines():
    q, k, v, *_ = inputs(torch.float64)
    out = murf_fast.reference.neighborhood_attention(q, k, v, (5, 3), (2, 1))
    assert torch.equal(out, murf_fast.neighborhood_attention(q, k, v, kernel_size=(5, 3), stride=(2, 1)))


def test_compile():
    tensors = inputs(torch.float32)

    def function(*tensors):
        return call(tensors, {"kernel_size": 3}, None) * 2

    torch.compiler.reset()
    assert torch.equal(torch.compile(function, fullgraph=True)(*tensors), function(*tensors))


@pytest.mark.parametrize("dilation", [1, 2, (3, 1), (2, 3)], ids=str)
@pytest.mark.parametrize(
    ("kernel_size", "stride"),
    [(3, 1), (4, 1), ((5, 2), 1), (3, 3), ((5, 4), (2, 3)), ((4, 3), (4, 1)), ((2, 5), (1, 5))],
    ids=str,
)
def test_natten(kernel_size, stride, dilation):
    """Against an installed NATTEN: on CPU its Flex backend, which asks for head widths that are powers of two."""
    natten = pytest.importorskip("natten", reason="natten, whose na2d is the peer, is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn((2, 16, 15, 2, 16), generator=generator).to(device) for _ in range(3))
    options = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    expected = natten.na2d(q, k, v, **options)
    assert (murf_fast.neighborhood_attention(q, k, v, **options) - expected).abs().max() <= 3e-6


Q = torch.ones(1, 4, 5, 2, 3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": Q[:, :3]}, ValueError, r"`k` must have the sizes of `q`, \(1, 4, 5, 2, 3\), got \(1, 3, 5, 2, 3\)"),
        ({"v": Q[:, :, :, :1]}, ValueError, r"`v` must have the sizes of `q`, \(1, 4, 5, 2\), got \(1, 4, 5, 1\)"),
        ({"q": Q[0]}, ValueError, r"`q` must be \(B, H, W, heads, dim\), got shape \(4, 5, 2, 3\)"),
        ({"q": Q.int()}, TypeError, "`q` must be floating point, got torch.int32"),
        ({"kernel_size": 5}, ValueError, "must fit the height of the output, 4, got 5"),
        ({"kernel_size": 2, "dilation": 3}, ValueError, r"must fit the height of the output, 4, got 2 \* 3"),
        ({"stride": 0}, ValueError, "`stride` must be at least 1, got 0"),
        ({"scale": float("nan")}, ValueError, "`scale` must be finite, got nan"),
        ({"bias": (torch.ones(2), torch.ones(3))}, ValueError, r"`bias\[1\]` must have shape \(2,\) or \(2, 5, 5\)"),
        ({"backend": "natten"}, BackendUnavailableError, "it is used for CUDA tensors, these are on cpu"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"q": Q, "k": Q, "v": Q, "kernel_size": 3, **change}
    with pytest.raises(error, match=words):
        murf_fast.neighborhood_attention(**arguments)
