"""Triton's interpreter with the digits of tensor cores: products in TF32 see 11 digits of their operands, cut off.

The interpreter itself multiplies float32 with all digits, whatever the precision, so that it would not show a product
in TF32 where float32's digits were meant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from triton._C.libtriton import ir
from triton.runtime import interpreter


def in_tf32(x: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(x).view(np.int32) & -0x2000).view(np.float32)


@contextlib.contextmanager
def tensor_cores() -> Iterator[None]:
    builder = interpreter.InterpreterBuilder
    original = builder.create_dot

    def dot(self, a, b, d, precision, *more):
        if precision == ir.INPUT_PRECISION.TF32 and a.data.dtype == np.float32:
            a, b = (interpreter.TensorHandle(in_tf32(x.data), x.dtype) for x in (a, b))
        return original(self, a, b, d, precision, *more)

    builder.create_dot = dot
    try:
        yield
    finally:
        builder.create_dot = original
