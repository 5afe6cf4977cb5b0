"""Whether a kernel of a call has to be costed again: not while all that its row was made from is the same.

A seal stands for the launches of one kernel in a call (its source with all that it calls, Triton and its assembler, by
the key of Triton's cache; grid, numbers, the outlines of tensors and the values of tables), for the code that costs
them, and for the instructions that were found. It takes no compiler to see whether it still holds, and where it does
not, nothing is wrong: the row is made anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from launches import LARGE, Launch
from torch import Tensor

HERE = Path(__file__).parent
COUNTERS = ("cost.py", "launches.py", "weightless.py", "sass/*.py")


def seal(launches: Iterable[Launch], kernel: str, instructions: int) -> str:
    """Of the launches of ``kernel`` and the instructions in its row."""
    own = [_outline(launch) for launch in launches if launch.kernel.name == kernel]
    return _digest(json.dumps([_counters(), own, instructions]).encode())


def _outline(launch: Launch) -> list:
    values = [_tensor(value) if isinstance(value, Tensor) else repr(value) for _, value in launch.arguments]
    return [launch.kernel.hash, launch.grid, values]


def _tensor(tensor: Tensor) -> list:
    """Values only of integers: they may be the tables that decide how often a loop runs."""
    outline = [list(tensor.shape), list(tensor.stride()), str(tensor.dtype)]
    if tensor.dtype.is_floating_point or tensor.numel() * tensor.element_size() > LARGE:
        return outline
    return [*outline, _digest(tensor.contiguous().view(torch.uint8).numpy().tobytes())]


@cache
def _counters() -> str:
    files = sorted(path for pattern in COUNTERS for path in HERE.glob(pattern))
    return _digest(b"".join(path.read_bytes() for path in files))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
