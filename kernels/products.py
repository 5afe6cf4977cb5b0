"""Float32 products on tensor cores.

Tensor cores multiply float32 in TF32, which keeps 11 of its 24 digits. The sum of an operand's nearest TF32 number and
of what that leaves, cut to 11 digits, has 22 and more; three products of such parts are as exact as float32 arithmetic.
Triton's own ``tf32x3`` is the same and looks for NaN in every sum besides, which takes a comparison and a selection for
each element; it keeps what is beside an infinity.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """``total + a b`` in float32; half precision is exact in TF32. Beside an infinity it may be NaN.

    PRECISION: ``"tf32"`` for one product in TF32, else the digits of float32 (:func:`launch.dot_precision`).
    """
    a_high, a_low = _parts(a)
    b_high, b_low = _parts(b)
    if PRECISION == "tf32":
        # Else the low parts keep a NaN.
        return tl.dot(_or_nan(a_high, a), _or_nan(b_high, b), total, input_precision="tf32")
    # Tensor cores cut their sums off, towards zero, after every eight terms: by the end of a long sum that is more than
    # float32 arithmetic loses. So the terms of one call are summed by themselves, the smallest first, and added to the
    # total by an addition that rounds.
    terms = tl.zeros_like(total)
    if a.dtype == tl.float32:
        terms = tl.dot(a_low, b_high, terms, input_precision="tf32")
    if b.dtype == tl.float32:
        terms = tl.dot(a_high, b_low, terms, input_precision="tf32")
    return total + tl.dot(a_high, b_high, terms, input_precision="tf32")


@triton.jit
def _parts(x):
    """The TF32 numbers nearest to ``x``, as float32, and what they leave."""
    x = x.to(tl.float32)
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _or_nan(high, x):
    """A GPU's NaN has all bits of its fraction set, and was rounded to zero."""
    return tl.where(x == x, high, x.to(tl.float32))


@triton.jit
def taken_apart(b, PRECISION: tl.constexpr):
    """What :func:`product_of_parts` takes of float32 factors: for a kernel that multiplies by the same ones often."""
    high, low = _parts(b)
    if PRECISION == "tf32":
        return _or_nan(high, b), low
    return high, low


@triton.jit
def product_of_parts(a, b_high, b_low, total, PRECISION: tl.constexpr):
    """:func:`product` of float32 ``a`` and ``b``, which has been taken apart."""
    a_high, a_low = _parts(a)
    if PRECISION == "tf32":
        return tl.dot(_or_nan(a_high, a), b_high, total, input_precision="tf32")
    terms = tl.dot(a_low, b_high, tl.zeros_like(total), input_precision="tf32")
    terms = tl.dot(a_high, b_low, terms, input_precision="tf32")
    return total + tl.dot(a_high, b_high, terms, input_precision="tf32")
