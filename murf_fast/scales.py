"""Scales as people write them, times sizes in pixels, in exact arithmetic.

A float is a binary number next to the one that was meant: ``0.7 * 180`` is 125.99999999999999, and a floor loses a
whole patch with it. :func:`exact_ratio` finds the number that was meant, and :func:`scaled_pixels`
multiplies by it exactly.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import numpy as np

Ratio = tuple[int, int]


@functools.lru_cache(1024, typed=True)
def exact_ratio(scale: float) -> Ratio:
    """(numerator, denominator) of what ``scale`` stands for: of all that round to this float, the simplest fraction.

    That is every decimal of up to seven digits (0.7 is 7/10) and every ratio of two sizes (``518 / 224`` is 37/16,
    ``1 / 3`` is 1/3), also as NumPy floats of any width. ``scale`` is a positive, finite real number; integers,
    fractions and decimals stand for themselves.
    """
    value = Fraction(scale.item() if isinstance(scale, np.generic) else scale)
    if isinstance(scale, (float, np.floating)):
        spacing = np.spacing(scale) if isinstance(scale, np.floating) else math.ulp(scale)
        half = Fraction(float(spacing)) / 2
        value = _simplest(value - half, value + half)
    return value.numerator, value.denominator


def scaled_pixels(scale: float | Ratio, size: int, *, up: bool = False) -> int:
    """``floor(scale * size)``, or with ``up`` the ceiling, of the exact product: ``scaled_pixels(0.7, 180)`` is 126.

    ``scale`` is a number or its :func:`exact_ratio`; with the latter, sizes may be symbolic.
    """
    numerator, denominator = scale if isinstance(scale, tuple) else exact_ratio(scale)
    return -(-size * numerator // denominator) if up else size * numerator // denominator


def _simplest(low: Fraction, high: Fraction) -> Fraction:
    """The fraction of the smallest denominator within [low, high], by their continued fractions."""
    above = math.ceil(low)
    if above <= high:
        return Fraction(above)
    whole = above - 1
    return whole + 1 / _simplest(1 / (high - whole), 1 / (low - whole))
