"""What the launches of several kernels share. Tile choices lie beside their kernels: frozen results of pure functions
of shapes and dtypes. Each says what it was chosen for, and which were measured on a GPU; the others never were.

Arguments that belong together are named tuples. One that holds tuples must hold nothing else: where it does, Triton 3.6
makes None of an integer that is 1 in the inner ones, once a loop has been entered.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# What has become of the kernels: they are imported when this is.
INTERPRETED = triton.knobs.runtime.interpret


class Map(NamedTuple):
    """A tensor (B, C, H, W) of any strides, as kernels take it; strides in elements."""

    data: Tensor
    stride_b: int
    stride_c: int
    stride_y: int
    stride_x: int


def map_of(x: Tensor) -> Map:
    return Map(x, *x.stride())


def dot_precision(in_parts: bool = False) -> str:
    """How every float32 product of a kernel is computed: in TF32 if the user has allowed it to torch, else with
    the digits of float32 (see :mod:`murf_fast.kernels.products`), or, where a kernel's error budget allows it,
    ``in_parts``: in Triton's three TF32 products of the factors' high and low halves, which is float32 but for the last
    bits.
    """
    matmul = torch.backends.cuda.matmul
    # The newer of torch's two switches follows the older one, which raises once the newer has been used.
    precision = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if allowed else "tf32x3" if in_parts else "ieee"


def architecture(device: torch.device) -> int:
    """Of a GPU, 90 for compute capability 9.0, which is also what Triton's interpreter stands for."""
    if INTERPRETED:
        return 90
    if device.type == "cuda":
        return _capability(device)
    return triton.runtime.driver.active.get_current_target().arch  # compiled for a GPU that is not here


def without_warp_groups(architecture: int) -> bool:
    """Whether a warp multiplies by itself, with its operands in its registers: sm_80, sm_89, sm_120."""
    return not 90 <= architecture < 120


@functools.lru_cache(64)
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@triton.jit
def bound(n):
    """``n`` as the end of a loop's range: loops over ranges have their loads pipelined, unlike those of a condition."""
    return n


if INTERPRETED:

    def bound(n):
        """In the interpreter, whose scalars are arrays of one element, of which NumPy no longer makes an index."""
        return n.handle.data.item() if isinstance(n, tl.tensor) else n


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device and stream, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up. Triton's own is made for kernels, too, and takes 3 us of a host that has 60 for a call."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; where there is none, those of an H100."""
    return 132 if INTERPRETED or device.type != "cuda" else _multiprocessors(device)


@functools.lru_cache(64)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
