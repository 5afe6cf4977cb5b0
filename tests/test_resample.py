"""The tables against torch in float64, against the stored results of torch, and against their own definition."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import dense_tables
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from murf_fast import reference
from murf_fast.tables.gaussian import gaussian_axis
from murf_fast.tables.resize import ANTIALIASED, MODES, NEAREST, axis, gram_axis, is_large, scaled_size

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


# torch rounds the positions of the nearest modes otherwise in float64; they have tests of their own below.
FILTERS = [rule for rule in RULES if rule[0] not in NEAREST]


@pytest.mark.parametrize(("mode", "antialias"), FILTERS)
@given(in_size=sizes, out_size=sizes)
@settings(max_examples=40, deadline=None)
def test_equals_torch(mode, antialias, in_size, out_size):
    table = axis(in_size, out_size, mode, antialias)
    expected = torch_matrix(in_size, out_size, mode, antialias)
    assert np.abs(table.dense() - expected).max() <= TABLE_ERROR


@pytest.mark.parametrize(("mode", "antialias"), [rule for rule in FILTERS if rule[0] != "area"])
@given(in_size=st.integers(1, 60), factor=st.floats(0.5, 4.0) | st.floats(1.0, 1.1))
@settings(max_examples=60, deadline=None)
def test_scale_factor_equals_torch(mode, antialias, in_size, factor):
    """Also on an axis that keeps its size beside one that does not: torch copies it in some modes."""
    assume(scaled_size(in_size, factor) > 0)
    table = axis(in_size, scaled_size(in_size, factor), mode, antialias, None, factor)
    identity = torch.eye(in_size, dtype=torch.float64).view(in_size, 1, in_size, 1).expand(-1, -1, -1, 2)
    columns = reference.resize(identity, (table.out_size, 4), mode, antialias, None, (factor, 2.0))
    assert np.abs(table.dense() - columns[:, 0, :, 0].T.numpy()).max() <= TABLE_ERROR


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


def assert_same(table, expected):
    assert (table.in_size, table.out_size) == (expected.in_size, expected.out_size)
    for name in ("first", "count", "weights"):
        actual, wanted = getattr(table, name), getattr(expected, name)
        assert actual.dtype == wanted.dtype
        assert np.array_equal(actual, wanted), name


lengths = st.integers(1, 8) | st.integers(1, 150)


@pytest.mark.parametrize(("mode", "antialias"), RULES)
@given(in_size=lengths, out_size=lengths, via=st.none() | lengths, factor=st.none() | st.floats(0.3, 4.0))
@settings(max_examples=40, deadline=None)
def test_bands_are_the_whole_matrix(mode, antialias, in_size, out_size, via, factor):
    """Bit for bit, also the transposed table; sums of several products (chains, moments) up to their order."""
    if factor is not None:
        out_size, via = scaled_size(in_size, factor), None
        assume(out_size > 0 and (out_size != in_size or not (antialias or mode == "bilinear")))
    table = axis(in_size, out_size, mode, antialias, via, factor)
    expected = dense_tables.axis(in_size, out_size, mode, antialias, via, factor)
    if via is None:
        assert_same(table, expected)
    else:
        assert np.abs(table.dense() - expected.dense()).max() <= TABLE_ERROR
    assert_same(table.transposed, dense_tables.transposed(table))
    if factor is None:
        gram = gram_axis(in_size, out_size, mode, antialias, via)
        assert np.array_equal(gram.dense(), gram.dense().T)
        expected = dense_tables.gram(table).dense()
        assert np.abs(gram.dense() - expected).max() <= TABLE_ERROR * max(1.0, expected.max())


@given(size=st.integers(1, 80), sigma=st.floats(0.1, 40), border=st.sampled_from(["symmetric", "reflect"]))
@settings(max_examples=100, deadline=None)
def test_bands_of_a_gaussian_are_the_whole_matrix(size, sigma, border):
    table, expected = gaussian_axis(size, sigma, border), dense_tables.gaussian(size, sigma, border)
    assert np.array_equal(table.first, expected.first)
    assert np.array_equal(table.count, expected.count)
    assert np.abs(table.weights - expected.weights).max() <= TABLE_ERROR


LONG = 10**6


@pytest.mark.parametrize(
    "build",
    [
        lambda: axis(LONG, 2 * LONG),
        lambda: axis(1, LONG),
        lambda: axis(LONG, 1, "bilinear", True),
        lambda: axis(20_000, 10_000, "area"),
        lambda: axis(76_286, 38_143, "bicubic", True),
        lambda: axis(LONG, 1000, "bilinear", True),
        lambda: axis(LONG, LONG, "nearest-exact"),
        lambda: axis(LONG, LONG, via=LONG // 2),
        lambda: axis(LONG, LONG // 2, "area").transposed,
        lambda: axis(2, LONG, "bicubic").transposed,
        lambda: gram_axis(LONG // 4, LONG // 2),
        lambda: gaussian_axis(LONG, 0.7, "reflect"),
        lambda: gaussian_axis(1000, 9e5, "symmetric"),
    ],
)
def test_memory_goes_with_the_table(build):
    """A whole matrix of these axes has 10^8 to 10^12 entries."""
    for cached in (axis, gram_axis, gaussian_axis):
        cached.cache_clear()
    tracemalloc.start()
    try:
        build()
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: axis(LONG, LONG, "area", via=3), "`via`: 1000000 pixels resized by way of 3 to 1000000"),
        (lambda: gram_axis(LONG, 1000, "bilinear", True), "`size`: the second moments of 1000000 pixels"),
        (lambda: gaussian_axis(LONG, 9e5, "reflect"), "`sigma`: 900000 pixels on an axis of 1000000"),
        (lambda: axis(2**31, 4), "at most 2147483647 pixels, got 2147483648 to 4"),
        (lambda: axis(4, 2**31), "at most 2147483647 pixels, got 4 to 2147483648"),
    ],
)
def test_tables_that_are_no_band_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


# torch rounds as the tables do where it has fused multiplications, which is any x86 processor of the last ten years.
rounds_alike = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason=f"torch's kernels for {torch.backends.cpu.get_cpu_capability()} round positions otherwise",
)


def pixels_read(in_size, size, mode, dtype=torch.float32, scale_factor=None):
    """What torch reads along the first axis; indices in two digits, which half types hold exactly."""
    at = torch.arange(in_size)
    digits = torch.stack([at // 100, at % 100]).to(dtype).view(1, 2, in_size, 1)
    factors = None if scale_factor is None else (scale_factor, float(size[1]))
    high, low = reference.resize(digits, size, mode, False, None, factors)[0, :, :, 0].long()
    return (high * 100 + low).numpy()


@rounds_alike
@pytest.mark.parametrize("mode", NEAREST)
def test_nearest_reads_the_pixels_of_torch(mode):
    """Sizes up to 300, every ninth pair (all of the smallest): by one of torch's two kernels up to 127, else the other.

    A walk over all 90,000 pairs of either mode found none that differs.
    """
    for n in range(1, 301):
        for m in range(1 + n % 9, 301, 9) if n > 4 else range(1, 301):
            table = axis(n, m, mode, large=is_large(mode, (m, 1)))
            assert np.array_equal(table.first, pixels_read(n, (m, 1), mode)), (n, m)


@rounds_alike
@pytest.mark.parametrize("mode", NEAREST)
def test_nearest_beside_a_long_axis_reads_the_pixels_of_torch(mode):
    """Torch takes its kernel of large results for short axes as well."""
    for n in (*range(1, 9), 60, 137, 300):
        for m in range(1, 130, 1 if n == 2 else 4):
            table = axis(n, m, mode, large=is_large(mode, (m, 128)))
            assert np.array_equal(table.first, pixels_read(n, (m, 128), mode)), (n, m)


@rounds_alike
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", NEAREST)
@given(
    n=st.integers(1, 8) | st.integers(1, 300),
    share=st.fractions(0, 1, max_denominator=50),
    whole=st.integers(0, 4),
    width=st.sampled_from([1, 64, 130]),
)
@settings(max_examples=80, deadline=None)
def test_nearest_with_a_factor_reads_the_pixels_of_torch(mode, dtype, n, share, whole, width):
    """Factors such as 1.05 and 2.001 too, which keep or double an axis without being 1 or 2."""
    factor = float(whole + share)
    m = scaled_size(n, factor)
    assume(m > 0)
    table = axis(n, m, mode, False, None, factor, is_large(mode, (m, width)))
    assert np.array_equal(table.first, pixels_read(n, (m, width), mode, dtype, factor))


@rounds_alike
def test_a_factor_of_nearly_two_is_the_step_of_large_results_only():
    small, large = (axis(20, 40, "nearest", False, None, 2.001, large).first for large in (False, True))
    assert np.array_equal(small, np.arange(40) // 2)
    assert np.array_equal(large, np.floor(np.arange(40) / 2.001))


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
