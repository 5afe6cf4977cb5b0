"""PHI-S: Hadamard matrices, the fit from a stream, forward, inverse and fold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from guided import assert_close, draw
from originals import golden
from torch import nn
from util import assert_within_budget

from murf_fast.nn import PHIS
from murf_fast.nn.featsharp import phis as phis_file
from murf_fast.nn.featsharp._hadamard import _construction, hadamard, is_constructible, neighbors
from murf_fast.reference import featsharp as plain

# Every construction: doublings, both of Paley's over primes and over powers of them, products.
ORDERS = (1, 2, 4, 12, 20, 28, 36, 52, 100, 144, 244, 344, 684, 1904)
# Widths of vision transformers.
WIDTHS = (192, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536, 2048, 3200)


def arrays():
    return {key: torch.from_numpy(value) for key, value in golden("featsharp__tiles_phis_bias").items()}


def normalized(n):
    return torch.from_numpy(hadamard(n)).double() * n**-0.5


@pytest.mark.parametrize("n", ORDERS)
def test_hadamard(n):
    matrix = hadamard(n)
    assert matrix.dtype == np.int8
    assert set(np.unique(matrix)) <= {-1, 1}
    wide = matrix.astype(np.float32)  # which has all integers of this size
    assert np.array_equal(wide @ wide.T, n * np.eye(n))


def test_every_construction_is_tested():
    kinds = {_construction(n) for n in ORDERS}
    assert {"sylvester", "product", "paley 1", "paley 2"} == {kind for kind, _ in kinds}
    assert ("product", 28) in kinds  # Kronecker's, where nothing can be doubled
    assert {("paley 1", 27), ("paley 1", 243), ("paley 1", 343), ("paley 2", 25), ("paley 2", 49)} <= kinds


def test_orders():
    assert all(map(is_constructible, WIDTHS))
    assert all(is_constructible(a << k) for a in (1, 12, 20, 28, 36, 44, 52) for k in range(6))
    assert not any(map(is_constructible, (0, -4, 3, 6, 50, 92, 116)))
    assert neighbors(92) == (88, 96)
    assert neighbors(3) == (2, 4)
    with pytest.raises(ValueError, match="order 92"):
        hadamard(92)


@pytest.mark.parametrize("channels", [12, 16])
def test_golden(channels):
    data = {k.removeprefix(f"phis{channels}."): v for k, v in arrays().items() if k.startswith(f"phis{channels}.")}
    module = PHIS(channels)
    module.load_state_dict({name: data[name] for name in ("mean", "alpha", "rotation", "inv_rotation")})
    scale = float(data["output"].abs().max())
    assert_close(module(data["features"]), data["output"], 2e-6 * scale)
    assert_close(module.inverse(data["output"]), data["features"], 2e-6 * float(data["features"].abs().max()))
    fitted = PHIS.from_moments(data["mean"], data["covariance"])
    assert_close(fitted.alpha, data["alpha"], 2e-6 * float(data["alpha"]))
    matrix = (fitted.alpha * fitted.rotation).double()
    variances = (matrix @ data["covariance"].double() @ matrix.mT).diagonal()
    assert_close(variances, torch.ones(channels), 1e-5)


def moments(rows):
    rows = rows.double()
    centred = rows - rows.mean(0)
    return rows.mean(0), centred.mT @ centred / len(rows)


@pytest.mark.parametrize("channels", [1, 2, 12, 36])
def test_fit(channels, monkeypatch):
    """From any cut of the stream, with a mean far beyond the deviations."""
    monkeypatch.setattr(phis_file, "_ROWS", 7)
    rows = draw(60, channels) * torch.linspace(0.1, 3, channels) + 300
    mean, covariance = moments(rows)
    maps = rows[:48].unflatten(0, (2, 4, 6)).permute(0, 3, 1, 2)
    streams = ([rows], [rows[:1], rows[1:2], rows[2:]], [maps, rows[48:].unflatten(0, (3, 4))], iter(rows.split(11)))
    for stream in streams:
        module = PHIS.fit(stream)
        torch.testing.assert_close(module.mean.double(), mean, rtol=1e-6, atol=0)
        matrix = module.alpha.double() * module.rotation.double()
        variances = (matrix @ covariance @ matrix.mT).diagonal()
        torch.testing.assert_close(variances, torch.ones_like(variances), rtol=1e-5, atol=0)
        product = module.rotation.double() @ module.inv_rotation.double()
        torch.testing.assert_close(product, torch.eye(channels).double(), rtol=0, atol=1e-6)
    single = PHIS.fit(rows)
    expected = PHIS.from_moments(mean, covariance)
    torch.testing.assert_close(single.alpha, expected.alpha, rtol=1e-6, atol=0)


def test_fit_is_the_plain_statement():
    rows = draw(200, 12) @ draw(12, 12)
    mean, covariance = moments(rows)
    module = PHIS.from_moments(mean, covariance)
    matrix = plain.phis(covariance, normalized(12))
    torch.testing.assert_close((module.alpha * module.rotation).double(), matrix, rtol=1e-5, atol=1e-6)


def test_a_singular_covariance_will_do():
    """Its rotation is as good as any: nothing is divided by an eigenvalue."""
    rows = draw(40, 2) @ draw(2, 12)
    module = PHIS.fit([rows])
    standard = module(rows)
    torch.testing.assert_close(standard.var(0, correction=0), torch.ones(12), rtol=1e-4, atol=0)
    torch.testing.assert_close(module.inverse(standard), rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 12, 3, 5), (7, 12), (2, 3, 12)], ids=str)
def test_forward_and_inverse(shape, dtype):
    module = PHIS.fit([50 + draw(100, 12) @ draw(12, 12)])
    x = (50 + draw(*shape)).to(dtype)
    axis = 1 if len(shape) == 4 else -1
    matrix, mean = module.alpha.double() * module.rotation.double(), module.mean.double()

    def forward(x, dtype):
        rows = x.to(dtype).movedim(axis, -1)
        return ((rows - mean.to(dtype)) @ matrix.to(dtype).mT).movedim(-1, axis)

    def inverse(x, dtype):
        inverted = (module.inv_rotation.double() / module.alpha.double()).to(dtype)
        return (x.to(dtype).movedim(axis, -1) @ inverted.mT + mean.to(dtype)).movedim(-1, axis)

    wide = torch.promote_types(dtype, torch.float32)
    for call, formula, given in ((module, forward, x), (module.inverse, inverse, forward(x, torch.float64).to(dtype))):
        result = call(given)
        assert result.dtype == dtype
        # Twelve terms of 50: in float64 the oracle is no better than the result.
        assert_within_budget(result, formula(given, torch.float64), formula(given, wide), terms=12 * 50)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(call(given), result)


def test_inverse_is_exact():
    module = PHIS.fit([5 + draw(100, 36) @ draw(36, 36)]).double()
    x = draw(2, 36, 3, 3).double()
    # The buffers are those of a float32 module, whose products are the identity to a few of its roundings.
    torch.testing.assert_close(module.inverse(module(x)), x, rtol=0, atol=1e-5)
    new = PHIS(12)
    assert torch.equal(new(x[:, :12].float()), x[:, :12].float())


def test_gradients_and_compile():
    module = PHIS.fit([draw(50, 12)]).double()
    x = draw(2, 12, 2, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(module, x)
    assert torch.autograd.gradcheck(module.inverse, x)
    compiled = torch.compile(lambda x: module.inverse(module(x)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_fold(bias):
    """A linear map of raw features, whatever their mean."""
    module = PHIS.fit([300 + draw(100, 12) @ draw(12, 12)])
    x = 300 + draw(2, 12, 3, 4)
    for linear in (nn.Linear(12, 5, bias=bias), nn.Conv2d(12, 5, 1, bias=bias)):
        folded = module.fold(linear)
        assert type(folded) is type(linear)
        is_linear = isinstance(linear, nn.Linear)
        given = x.permute(0, 2, 3, 1) if is_linear else x
        given = given.flatten(1, 2) if is_linear else given
        oracle = linear.double()(module.double()(given.double()))
        exact = folded.double()(given.double())
        module.float()
        # One rounding of the folded weights, which meet the mean.
        terms = float(folded.weight.detach().abs().sum(1).max()) * 300
        assert float((exact - oracle).abs().max().detach()) <= 2 * torch.finfo(torch.float32).eps * terms
    assert module.fold(nn.Linear(12, 3).bfloat16()).weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PHIS(92), ValueError, r"`channels` must be the order of a Hadamard matrix.*\(88, 96\), got 92"),
        (lambda: PHIS(0), ValueError, "`channels` must be at least 1, got 0"),
        (lambda: PHIS(12.0), TypeError, "`channels` must be an integer"),
        (lambda: PHIS.fit([]), ValueError, "got an empty stream"),
        (lambda: PHIS.fit([torch.ones(0, 12)]), ValueError, "got an empty stream"),
        (lambda: PHIS.fit(3), TypeError, "`features` must be an iterable of tensors, got int"),
        (lambda: PHIS.fit([3]), TypeError, r"`features\[0\]` must be a floating-point tensor"),
        (lambda: PHIS.fit([torch.ones(12)]), ValueError, r"`features\[0\]` must be \(B, C, H, W\) or"),
        (lambda: PHIS.fit([torch.ones(5, 92)]), ValueError, "order of a Hadamard matrix"),
        (lambda: PHIS.fit([draw(5, 12), draw(5, 8)]), ValueError, r"`features\[1\]` must have 12 channels"),
        (lambda: PHIS.fit([torch.ones(5, 12)]), ValueError, "`features` must be of features that vary"),
        (lambda: PHIS.fit([torch.full((999, 12), 0.1)]), ValueError, "`features` must be of features that vary"),
        (lambda: PHIS.fit([torch.full((5, 12), torch.nan)]), ValueError, "`features` must be finite"),
        (lambda: PHIS.from_moments(torch.ones(3), torch.eye(4)), ValueError, r"`covariance` \(C, C\), got \(3,\)"),
        (lambda: PHIS.from_moments(torch.ones(4), draw(4, 4)), ValueError, "must be symmetric, got entries that are"),
        (lambda: PHIS.fit([1e-42 * draw(9, 4).double()]), ValueError, "reciprocal in float32"),
        (lambda: PHIS(12)(torch.ones(2, 8, 3, 3)), ValueError, r"must be \(B, 12, H, W\)"),
        (lambda: PHIS(12)(3), TypeError, "`features` must be a floating-point tensor"),
        (lambda: PHIS(12).inverse(torch.ones(12)), ValueError, "of two or three dimensions"),
        (lambda: PHIS(12).fold(nn.ReLU()), TypeError, "must be an nn.Linear or a 1x1 nn.Conv2d, got ReLU"),
        (lambda: PHIS(12).fold(nn.Linear(8, 3)), ValueError, "must have 12 inputs, got 8"),
        (lambda: PHIS(12).fold(nn.Conv2d(12, 3, 3)), ValueError, "must be a 1x1 convolution"),
        (lambda: PHIS(12).fold(nn.Conv2d(12, 12, 1, groups=2)), ValueError, "must be a 1x1 convolution"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
