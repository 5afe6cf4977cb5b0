"""Masks of one truth value for a whole block, which Triton's interpreter makes numbers of.

To it the comparison of two scalars is of their type, int32, and so is the block that it is spread over; compiled, both
have one bit. Loads and stores took such numbers for masks until Triton 3.9, which refuses them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
from triton.runtime import interpreter


@contextlib.contextmanager
def truth_values() -> Iterator[None]:
    """Truth values stay such when they are spread."""
    spread = interpreter.InterpreterBuilder.create_splat

    def create_splat(self, shape, value):
        result = spread(self, shape, value)
        if value.data.dtype == np.bool_:
            result.data = result.data.astype(np.bool_)
        return result

    with mock.patch.object(interpreter.InterpreterBuilder, "create_splat", create_splat):
        yield
