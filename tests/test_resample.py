"""The tables against torch in float64, against the stored results of torch, and against their own definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from murf_fast import reference
from murf_fast.resample import ANTIALIASED, MODES, axis, gram_axis, scaled_size

GOLDEN = np.load(Path(__file__).parent / "golden" / "interpolate__primitives.npz")
RULES = [(mode, False) for mode in MODES] + [(mode, True) for mode in ANTIALIASED]
# Weights are stored in float32: a row of k taps is off by at most this much for inputs of size one.
TABLE_ERROR = np.finfo(np.float32).eps


def torch_matrix(in_size, out_size, mode, antialias, scale_factor=None):
    identity = torch.eye(in_size, dtype=torch.float64).view(in_size, 1, in_size, 1)
    factors = None if scale_factor is None else (scale_factor, 1.0)
    columns = reference.resize(identity, (out_size, 1), mode, antialias, None, factors)
    return columns.view(in_size, -1).T.numpy()


sizes = st.integers(1, 70)


@pytest.mark.parametrize(("mode", "antialias"), RULES)
@given(in_size=sizes, out_size=sizes)
@settings(max_examples=40, deadline=None)
def test_equals_torch(mode, antialias, in_size, out_size):
    table = axis(in_size, out_size, mode, antialias)
    expected = torch_matrix(in_size, out_size, mode, antialias)
    assert np.abs(table.dense() - expected).max() <= TABLE_ERROR


@pytest.mark.parametrize(("mode", "antialias"), [r for r in RULES if r[0] != "area"])
@given(in_size=st.integers(2, 60), factor=st.floats(0.5, 4.0))
@settings(max_examples=40, deadline=None)
def test_scale_factor_equals_torch(mode, antialias, in_size, factor):
    # Where nothing changes in size torch copies in some modes; that is murf_fast.resize's business, not the table's.
    assume(scaled_size(in_size, factor) != in_size)
    table = axis(in_size, scaled_size(in_size, factor), mode, antialias, None, factor)
    expected = torch_matrix(in_size, scaled_size(in_size, factor), mode, antialias, factor)
    assert table.dense().shape == expected.shape
    assert np.abs(table.dense() - expected).max() <= TABLE_ERROR


def test_scale_factor_is_not_size():
    by_factor = axis(37, scaled_size(37, 1.51), "bicubic", scale_factor=1.51)
    by_size = axis(37, scaled_size(37, 1.51), "bicubic")
    assert np.abs(by_factor.dense() - by_size.dense()).max() > 0.1


@pytest.mark.parametrize(("mode", "antialias"), RULES)
@given(in_size=sizes, via=sizes, out_size=sizes)
@settings(max_examples=20, deadline=None)
def test_chained_resizes_compose(mode, antialias, in_size, via, out_size):
    table = axis(in_size, out_size, mode, antialias, via)
    expected = axis(via, out_size, mode, antialias).dense() @ axis(in_size, via, mode, antialias).dense()
    assert np.abs(table.dense() - expected).max() <= 3 * TABLE_ERROR


def test_chained_resizes_are_not_one():
    assert np.abs(axis(18, 100, via=37).dense() - axis(18, 100).dense()).max() > 0.1


@pytest.mark.parametrize(("mode", "antialias"), RULES)
@given(in_size=sizes, out_size=sizes, via=st.none() | sizes)
@settings(max_examples=20, deadline=None)
def test_structure(mode, antialias, in_size, out_size, via):
    """What kernels rely on: bands inside the input, in order, rows that sum to one; and the transposed table."""
    table = axis(in_size, out_size, mode, antialias, via)
    for t in (table, table.transposed, gram_axis(in_size, out_size, mode, antialias, via)):
        assert t.first.dtype == t.count.dtype == np.int32
        assert t.weights.dtype == np.float32
        assert (np.diff(t.first) >= 0).all()
        assert (t.first >= 0).all()
        assert (t.count >= 0).all()
        assert (t.first + t.count <= t.in_size).all()
        assert (t.count <= t.taps).all()
        assert not t.weights[np.arange(t.taps) >= t.count[:, None]].any()
    assert np.abs(table.dense().sum(1) - 1).max() <= 8 * TABLE_ERROR
    assert np.array_equal(table.transposed.dense(), table.dense().T)
    gram = gram_axis(in_size, out_size, mode, antialias, via).dense()
    expected = table.dense().T @ table.dense()
    assert np.abs(gram - expected).max() <= TABLE_ERROR * max(1.0, np.abs(expected).max())


def test_bands_are_narrow():
    """Upsampling reads two taps, a chain of two at most three, bicubic four: no kernel pays for zeros."""
    assert axis(18, 518).taps == 2
    assert axis(18, 512, via=56).taps <= 3
    assert axis(37, 56, "bicubic").taps == 4
    assert gram_axis(18, 518).taps == 3


def test_tables_are_cached():
    assert axis(37, 56, "bicubic") is axis(37, 56, "bicubic")
    assert axis(37, 56).on(torch.device("cpu"))[2] is axis(37, 56).on(torch.device("cpu"))[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((4, 5, "lanczos"), "`mode` must be one of"),
        ((4, 5, "area", True), "`antialias` needs mode"),
        ((4, 5, "bilinear", False, 6, 1.2), "exclude each other"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(ValueError, match=words):
        axis(*arguments)


def golden_keys():
    for key in GOLDEN.files:
        mode, _, size = key.partition(".")
        name = mode.removesuffix("_aa").replace("nearest_exact", "nearest-exact")
        if name in MODES and "x" in size:
            yield pytest.param(key, name, mode.endswith("_aa"), tuple(map(int, size.split("x"))), id=key)


def apply(x, table_y, table_x):
    return np.einsum("yi,bcij,xj->bcyx", table_y.dense(), x.astype(np.float64), table_x.dense())


# The stored results are float64 results rounded to float32, of values up to about 4 with up to 17 x 13 weights.
GOLDEN_ERROR = 1e-6


@pytest.mark.parametrize(("key", "mode", "antialias", "size"), list(golden_keys()))
def test_golden(key, mode, antialias, size):
    x = GOLDEN["x"]
    actual = apply(x, axis(13, size[0], mode, antialias), axis(17, size[1], mode, antialias))
    assert np.abs(actual - GOLDEN[key]).max() <= GOLDEN_ERROR


@pytest.mark.parametrize(
    ("index", "factors"), [(0, (1.7, 0.6)), (1, (2.0, 2.0)), (2, (0.31, 3.3)), (3, (2.1, 1.45))], ids=str
)
@pytest.mark.parametrize("rule", ["bilinear", "bilinear_aa", "bicubic", "bicubic_aa"])
def test_golden_scale_factor(rule, index, factors):
    mode, antialias = rule.removesuffix("_aa"), rule.endswith("_aa")
    tables = [axis(n, scaled_size(n, f), mode, antialias, None, f) for n, f in zip((13, 17), factors, strict=True)]
    assert np.abs(apply(GOLDEN["x"], *tables) - GOLDEN[f"scale{index}.{rule}"]).max() <= GOLDEN_ERROR


def test_golden_chain():
    actual = apply(GOLDEN["x"], axis(13, 50, via=23), axis(17, 71, via=19))
    assert np.abs(actual - GOLDEN["chain.23x19.50x71"]).max() <= GOLDEN_ERROR


@pytest.mark.parametrize("rule", ["bilinear", "bicubic", "bilinear_aa", "bicubic_aa", "area"])
@pytest.mark.parametrize("size", [(29, 37), (7, 5)])
def test_golden_gradient(rule, size):
    mode, antialias = rule.removesuffix("_aa"), rule.endswith("_aa")
    tables = [axis(n, m, mode, antialias).transposed for n, m in zip((13, 17), size, strict=True)]
    key = f"grad.{rule}.{size[0]}x{size[1]}"
    assert np.abs(apply(GOLDEN[f"{key}.grad_output"], *tables) - GOLDEN[f"{key}.grad_input"]).max() <= 5 * GOLDEN_ERROR
