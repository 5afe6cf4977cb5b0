"""Checks of single arguments, for the ops and their modules, window rules and measures alike.

A number is what has Python's number protocols: ``operator.index`` for integers, ``float`` for the others. So NumPy's
numbers and arrays without dimensions, fractions and decimals are taken, and symbolic numbers of a compiler pass
through. Booleans, strings and tensors (whose gradients would be lost, and which may lie on another device) are not.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from murf_fast.tables.resize import MAX_PIXELS

LEAST, MOST = -(2**63), 2**63 - 1
NO_NUMBERS = (bool, np.bool_, str, bytes, bytearray, Tensor, complex, np.complexfloating, np.flexible)


def dense(op: str, name: str, value: Tensor) -> Tensor:
    """A tensor whose entries lie in memory, at strides: not a sparse, nested or mkldnn one."""
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"murf_fast.{op}: `{name}` must be a dense, strided tensor, got a {layout} one")
    return value


def integer(op: str, name: str, value: Any, least: float = LEAST, most: float = MOST) -> int:
    """An integer within ``least`` .. ``most``."""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        value = _converted(op, name, value, operator.index, "an integer")
    if value < least:
        raise ValueError(f"murf_fast.{op}: `{name}` must be at least {least}, got {value}")
    if value > most:
        raise ValueError(f"murf_fast.{op}: `{name}` must be at most {most}, got {value}")
    return value


def number(op: str, name: str, value: Any) -> float:
    """A finite number; what range it must lie in is the caller's to check."""
    if type(value) is not float and not isinstance(value, torch.SymFloat):
        value = _converted(op, name, value, float, "a number")
    if not -math.inf < value < math.inf:
        raise ValueError(f"murf_fast.{op}: `{name}` must be finite, got {value}")
    return value


def numbers(op: str, name: str, values: Any, count: int | None = None) -> list[float]:
    """A sequence of (``count``) finite numbers."""
    if not is_sequence(values):
        raise TypeError(f"murf_fast.{op}: `{name}` must be a sequence of numbers, got {values!r}")
    if count is not None and len(values) != count:
        raise ValueError(f"murf_fast.{op}: `{name}` must be {count} numbers, got {values!r}")
    return [number(op, name, value) for value in values]


def pair(op: str, name: str, value: Any, least: int = 1) -> tuple[int, int]:
    """Two integers of at least ``least``, for rows and columns; one integer stands for both."""
    if not is_sequence(value):
        n = integer(op, name, value, least, MAX_PIXELS)
        return n, n
    if len(value) != 2:
        raise ValueError(f"murf_fast.{op}: `{name}` must be one or two integers, got {value!r}")
    first, second = value
    return integer(op, name, first, least, MAX_PIXELS), integer(op, name, second, least, MAX_PIXELS)


def is_sequence(value: object) -> bool:
    """Whether a value holds several: a sequence other than a string, or an array of one dimension."""
    if type(value) in (tuple, list):
        return True
    if isinstance(value, np.ndarray):
        return value.ndim == 1
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _converted(op: str, name: str, value: object, protocol: Callable[..., Any], what: str) -> Any:
    """What ``operator.index`` or ``float`` makes of a number."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if not isinstance(value, NO_NUMBERS):
        try:
            return protocol(value)
        except (TypeError, ValueError, OverflowError):
            pass
    raise TypeError(f"murf_fast.{op}: `{name}` must be {what}, got {value!r}")


def flag(op: str, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"murf_fast.{op}: `{name}` must be True or False, got {value!r}")
    return value


def choice(op: str, name: str, value: object, choices: Sequence[str], *, optional: bool = False) -> Any:
    """One of ``choices``, or None if that is allowed."""
    if value is None and optional:
        return None
    if not isinstance(value, str) or value not in choices:
        allowed = "None or one of" if optional else "one of"
        raise ValueError(f"murf_fast.{op}: `{name}` must be {allowed} {tuple(choices)}, got {value!r}")
    return value


def generator(op: str, value: object) -> None:
    """None, for torch's own, or one of random numbers that are drawn on the CPU."""
    if value is not None and not (isinstance(value, torch.Generator) and value.device.type == "cpu"):
        found = f"one on {value.device}" if isinstance(value, torch.Generator) else repr(value)
        raise TypeError(f"murf_fast.{op}: `generator` must be None or a torch.Generator on the CPU, got {found}")
