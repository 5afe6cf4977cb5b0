"""Triton's interpreter with the digits of tensor cores: products in TF32 see 11 digits of their operands, cut off, and
``tf32x3`` takes operands apart as its compiler does.

The interpreter itself multiplies float32 with all digits, whatever the precision, so that it would not show a product
in TF32 where float32's digits were meant.
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


@contextlib.contextmanager
def tensor_cores() -> Iterator[None]:
    builder = interpreter.InterpreterBuilder
    original = builder.create_dot

    def dot(self, a, b, d, precision, *more):
        if a.data.dtype != np.float32 or precision not in (TF32, THREE_PARTS):
            return original(self, a, b, d, precision, *more)

        def product(x, y, total):
            x, y = (interpreter.TensorHandle(in_tf32(v), of.dtype) for v, of in ((x, a), (y, b)))
            return original(self, x, y, total, precision, *more)

        if precision == TF32:
            return product(a.data, b.data, d)
        # What the high parts leave, first, and nothing of it where that is infinity less infinity.
        with np.errstate(invalid="ignore", over="ignore"):
            high_a, high_b = nearest_tf32(a.data), nearest_tf32(b.data)
            low_a, low_b = a.data - high_a, b.data - high_b
            rest = interpreter.TensorHandle(np.zeros_like(d.data), d.dtype)
            rest = product(high_a, low_b, product(low_a, high_b, rest))
            rest.data = np.where(np.isnan(rest.data), np.float32(0), rest.data)
            high = product(high_a, high_b, rest)
        return interpreter.TensorHandle(high.data + d.data, d.dtype)

    builder.create_dot = dot
    try:
        yield
    finally:
        builder.create_dot = original
