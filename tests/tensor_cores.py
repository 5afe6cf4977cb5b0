"""Triton's interpreter with the digits of tensor cores: products in TF32 see 11 digits of their operands, cut off,
their sums are cut off to float32 after every eight terms, and ``tf32x3`` takes operands apart as its compiler does.

The interpreter itself multiplies float32 with all digits and rounds the sum, whatever the precision, so that it would
show neither a product in TF32 where float32's digits were meant nor what long sums on tensor cores lose.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from triton._C.libtriton import ir
from triton.runtime import interpreter

TF32, THREE_PARTS = ir.INPUT_PRECISION.TF32, ir.INPUT_PRECISION.TF32x3


def in_tf32(x: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(x).view(np.int32) & -0x2000).view(np.float32)


def nearest_tf32(x: np.ndarray) -> np.ndarray:
    """``cvt.rna.tf32``, of what is finite."""
    bits = np.ascontiguousarray(x).view(np.int32)
    return np.where(np.isfinite(x), ((bits + 0x1000) & -0x2000).view(np.float32), x)


TERMS = 8  # of one instruction in TF32
CUTS = False  # whether sums are cut off; conftest.py says where


def cut(x: np.ndarray) -> np.ndarray:
    """float64 to float32, towards zero."""
    with np.errstate(over="ignore", invalid="ignore"):
        near = x.astype(np.float32)
    return np.where(np.abs(near.astype(np.float64)) > np.abs(x), np.nextafter(near, np.float32(0)), near)


def summed(x: np.ndarray, y: np.ndarray, total: np.ndarray) -> np.ndarray:
    """``total + x y``, in float32 that is cut off after every TERMS of the sum."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(0, x.shape[-1], TERMS):
            total = cut(total + x[..., k : k + TERMS] @ y[..., k : k + TERMS, :])
    return total


@contextlib.contextmanager
def tensor_cores() -> Iterator[None]:
    builder = interpreter.InterpreterBuilder
    original = builder.create_dot

    def dot(self, a, b, d, precision, *more):
        if a.data.dtype != np.float32 or precision not in (TF32, THREE_PARTS):
            return original(self, a, b, d, precision, *more)

        def product(x, y, total):
            if CUTS:
                return summed(in_tf32(x), in_tf32(y), total)
            x, y = (interpreter.TensorHandle(in_tf32(v), of.dtype) for v, of in ((x, a), (y, b)))
            return original(self, x, y, interpreter.TensorHandle(total, d.dtype), precision, *more).data

        if precision == TF32:
            return interpreter.TensorHandle(product(a.data, b.data, d.data), d.dtype)
        # What the high parts leave, first, and nothing of it where that is infinity less infinity.
        with np.errstate(invalid="ignore", over="ignore"):
            high_a, high_b = nearest_tf32(a.data), nearest_tf32(b.data)
            low_a, low_b = a.data - high_a, b.data - high_b
            rest = product(high_a, low_b, product(low_a, high_b, np.zeros_like(d.data)))
            high = product(high_a, high_b, np.where(np.isnan(rest), np.float32(0), rest))
            return interpreter.TensorHandle(high + d.data, d.dtype)

    builder.create_dot = dot
    try:
        yield
    finally:
        builder.create_dot = original
