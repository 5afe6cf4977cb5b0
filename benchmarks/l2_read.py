"""The rate at which a GPU reads what its L2 holds: a ceiling of kernels whose operands fit it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # floats of a program and pass: 16 KiB, four loads of 16 bytes a thread
PASSES = 64  # the first pass, which fills the L2 from memory, is a 64th of the reads


@triton.jit
def _read(x, largest, PASSES: tl.constexpr, BLOCK: tl.constexpr):
    """Another block of ``x`` in every pass, past the L1 (``.cg``)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    found = tl.zeros((BLOCK,), tl.float32)
    for n in range(PASSES):
        # A fifth of the grid further each time: neither what this multiprocessor has read nor what its neighbour reads.
        block = (program + n * (programs // 5 + 1)) % programs
        found = tl.maximum(found, tl.load(x + block * BLOCK + tl.arange(0, BLOCK), cache_modifier=".cg"))
    tl.store(largest + program, tl.max(found, 0))


def read_again(x: Tensor, largest: Tensor) -> None:
    """Reads all of ``x``, float32 of ``largest.numel() * BLOCK`` elements, ``PASSES`` times; maxima to ``largest``."""
    _read[(largest.numel(),)](x, largest, PASSES, BLOCK, num_warps=8)


def l2_bytes_per_s(l2_bytes: int, seconds_of: Callable, device: str = "cuda") -> float:
    """Of a buffer of a quarter of the L2, which leaves room for a copy in each of two partitions."""
    programs = max(1, l2_bytes // 4 // (4 * BLOCK))
    x, largest = (torch.ones(n, device=device) for n in (programs * BLOCK, programs))
    return PASSES * 4 * x.numel() / seconds_of(lambda: read_again(x, largest))
