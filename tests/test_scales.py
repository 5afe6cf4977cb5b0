"""Scales times sizes in exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from murf_fast.scales import exact_ratio, scaled_pixels


@given(st.integers(1, 7), st.data(), st.integers(1, 10**6))
def test_decimals_times_sizes_are_exact(digits, data, size):
    scale = Fraction(data.draw(st.integers(1, 4 * 10**digits)), 10**digits)
    assert exact_ratio(float(scale)) == scale.as_integer_ratio()
    assert scaled_pixels(float(scale), size) == math.floor(scale * size)
    assert scaled_pixels(float(scale), size, up=True) == math.ceil(scale * size)


@given(st.integers(1, 20_000), st.integers(1, 20_000))
def test_ratios_of_sizes_give_back_the_size(wanted, size):
    for up in (False, True):
        assert scaled_pixels(wanted / size, size, up=up) == wanted


@given(st.floats(1e-6, 1e6), st.integers(1, 10**6))
def test_any_float_stays_within_its_own_rounding(scale, size):
    assert abs(Fraction(*exact_ratio(scale)) - Fraction(scale)) <= Fraction(math.ulp(scale)) / 2
    assert abs(scaled_pixels(scale, size) - Fraction(scale) * size) <= 1 + Fraction(math.ulp(scale)) * size


@pytest.mark.parametrize("kind", [float, np.float64, np.float32, np.float16])
def test_every_width_of_float_is_the_decimal_that_was_written(kind):
    assert [exact_ratio(kind(f)) for f in (0.3, 0.5, 0.7, 1.5)] == [(3, 10), (1, 2), (7, 10), (3, 2)]


def test_integers_and_fractions_stand_for_themselves():
    assert [exact_ratio(n) for n in (2, np.int64(3), Fraction(2, 7))] == [(2, 1), (3, 1), (2, 7)]


def test_symbolic_sizes_compile_with_a_ratio():
    ratio = exact_ratio(0.7)

    @torch.compile(dynamic=True, fullgraph=True, backend="eager")
    def cut(x):
        return x[: scaled_pixels(ratio, x.shape[0])]

    assert [len(cut(torch.zeros(n))) for n in (180, 190, 200)] == [126, 133, 140]
