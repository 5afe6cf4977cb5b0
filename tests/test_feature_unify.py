"""AnyUp's feature-agnostic layer: its outputs, parity at every level and in Triton, gradients, bad input."""

from __future__ import annotations

import functools

import originals
import pytest
import torch
from suite import DTYPES, LAYOUTS, TRITON_DTYPES, for_triton
from util import assert_gradient_within_budget, assert_within_budget, layouts

import murf_fast

# (batch, channels, height, width), filters, kernel: channels above, below and not a multiple of the filters
SHAPES = (
    ((2, 12, 7, 5), 4, 3),
    ((1, 5, 4, 9), 16, 5),
    ((1, 37, 3, 2), 17, 5),
    ((1, 3, 1, 1), 1, 1),
    ((1, 7, 31, 2), 3, 3),
)
SMALL = (((1, 5, 2, 3), 4, 3), ((2, 4, 3, 2), 3, 3))
VARIANTS = pytest.mark.parametrize("variant", ["released", "paper"])


def inputs(shape, filters, kernel, dtype=torch.float32, layout="contiguous"):
    generator = torch.Generator().manual_seed(3)
    features = layouts((3 * torch.randn(shape, generator=generator)).to(dtype))[layout]
    return features, torch.randn((filters, 1, kernel, kernel), generator=generator).to(dtype)


def gradients(tensors, variant, backend):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = murf_fast.feature_unify(*leaves, variant, backend=backend)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(tensors[0].dtype).to(out)
    return torch.autograd.grad(out, leaves, direction)


@functools.cache
def references(shape, dtype, variant):
    """Result and gradients by the reference in float64 and in ``dtype``: one computation for every level and layout."""
    tensors = inputs(*shape, dtype)
    both = [t.double() for t in tensors], tensors
    results = [murf_fast.feature_unify(*t, variant, backend="reference") for t in both]
    return results, [gradients(t, variant, "reference") for t in both]


def check(shape, dtype, layout, variant, backend, device="cpu"):
    tensors = [t.to(device) for t in inputs(*shape, dtype, layout)]
    (oracle, same), both = references(shape, dtype, variant)
    actual = murf_fast.feature_unify(*tensors, variant, backend=backend)
    assert actual.dtype == dtype
    assert_within_budget(actual.cpu(), oracle, same)
    own = (g.cpu() for g in gradients(tensors, variant, backend))
    for name, a, o, s in zip(("features", "basis"), own, *both, strict=True):
        if o.norm() > 1e-12:  # else one filter: the softmax is constant
            assert_gradient_within_budget(a, o, s, name)
        else:
            assert not a.any()


@VARIANTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity_and_gradients(shape, dtype, variant, level):
    for layout in LAYOUTS if dtype == torch.float32 else ("tokens",):
        check(shape, dtype, layout, variant, "native")


@VARIANTS
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("layout", for_triton(["tokens"], ["contiguous"]))
@pytest.mark.parametrize("shape", for_triton(SMALL, SHAPES), ids=str)
def test_triton(shape, layout, dtype, variant, device):
    check(shape, dtype, layout, variant, "triton", device)


@VARIANTS
def test_triton_means_of_many_channels(variant, device):
    """AnyUp multiplies what the means differ by; the float32 reference's error in them is all it can bear."""
    tensors = [t.to(device) for t in inputs((1, 1024, 2, 1), 32, 3)]
    tensors[0] = torch.nn.functional.normalize(tensors[0], dim=1)
    oracle = murf_fast.feature_unify(*[t.double() for t in tensors], variant, backend="reference")
    error, allowed = (
        (murf_fast.feature_unify(*tensors, variant, backend=backend) - oracle).norm()
        for backend in ("triton", "reference")
    )
    assert error <= allowed


@VARIANTS
@pytest.mark.parametrize(
    "shape",
    [
        ((1, 8, 2, 3), 4, 7),  # taps in two parts
        ((1, 34, 1, 2), 17, 3),  # rows and columns that do not fill a tile, on both ways
    ],
    ids=str,
)
def test_triton_tiles(shape, variant, device):
    check(shape, torch.float32, "channels_last", variant, "triton", device)


@VARIANTS
def test_triton_rows_summed_in_parts(variant, device):
    """What the result is of; of gradients each chunk of rows has its own program, and the host sums them."""
    shape = ((1, 1040, 1, 1), 2, 1)
    (oracle, same), _ = references(shape, torch.float32, variant)
    actual = murf_fast.feature_unify(*(t.to(device) for t in inputs(*shape)), variant, backend="triton")
    assert_within_budget(actual.cpu(), oracle, same)


@VARIANTS
@pytest.mark.parametrize("shape", [((2, 4, 4, 3), 4, 3), ((1, 5, 5, 2), 4, 5)], ids=str)
def test_triton_bands(shape, variant, device, monkeypatch):
    """The patches' gradients exist row by row: pixels gather from several launches."""
    folded = pytest.importorskip("murf_fast.kernels.folded")
    monkeypatch.setattr(folded, "BAND_BYTES", 1)
    check(shape, torch.float32, "tokens", variant, "triton", device)


def test_golden(level):
    """The paper's checkpoint: the released code at C = 50, no multiple of its 128 filters."""
    data = originals.golden("anyup__paper_c50")
    basis = torch.from_numpy(originals.golden("anyup__basis")["basis"])
    features = torch.nn.functional.normalize(torch.from_numpy(data["features"]), dim=1)
    out = murf_fast.feature_unify(features, basis)
    assert (out - torch.from_numpy(data["lfu.f64"])).abs().max() <= 1e-8


@VARIANTS
def test_gradcheck(variant):
    tensors = [t.double().requires_grad_() for t in inputs((1, 3, 2, 3), 2, 3)]
    assert torch.autograd.gradcheck(lambda *t: murf_fast.feature_unify(*t, variant), tensors)


@VARIANTS
def test_registration(variant):
    features, basis = (t.requires_grad_() for t in inputs(*SHAPES[0]))
    released = variant == "released"
    torch.library.opcheck(torch.ops.murf_fast.feature_unify.default, (features, basis, released, "native"))
    grad = torch.randn(2, 4, 7, 5)
    arguments = (grad, features.detach(), basis.detach(), released, [True, True], "native")
    torch.library.opcheck(torch.ops.murf_fast.feature_unify_backward.default, arguments)


def test_compile_and_threads():
    tensors = inputs((2, 12, 29, 5), 4, 3)
    torch.compiler.reset()
    compiled = torch.compile(lambda *t: murf_fast.feature_unify(*t) * 2, fullgraph=True)
    assert torch.equal(compiled(*tensors), murf_fast.feature_unify(*tensors) * 2)
    expected, threads = gradients(tensors, "released", "native"), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = gradients(tensors, "released", "native")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, e) for a, e in zip(again, expected, strict=True))


def test_empty_batch():
    features, basis = (t.requires_grad_() for t in inputs((0, 3, 4, 5), 2, 3))
    out = murf_fast.feature_unify(features, basis)
    assert out.shape == (0, 2, 4, 5)
    assert not torch.autograd.grad(out.sum(), basis)[0].any()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"features": torch.ones(3, 4, 5)}, ValueError, r"`features` must be \(B, C, H, W\), got shape \(3, 4, 5\)"),
        ({"basis": torch.ones(4, 1, 2, 2)}, ValueError, r"`basis` must be \(M, 1, k, k\) with k odd, got"),
        ({"basis": torch.ones(4, 2, 3, 3)}, ValueError, r"got shape \(4, 2, 3, 3\)"),
        ({"basis": [1]}, TypeError, "`basis` must be a floating-point tensor, got list"),
        ({"variant": "code"}, ValueError, "`variant` must be one of .*'code'"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"features": torch.ones(1, 2, 3, 4), "basis": torch.ones(4, 1, 3, 3), **change}
    with pytest.raises(error, match=words):
        murf_fast.feature_unify(**arguments)
