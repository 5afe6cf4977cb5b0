"""What the launches of several kernels share. Tile choices lie beside their kernels: frozen results of pure functions
of shapes and dtypes. None of their numbers has been measured on a GPU yet; each says what it was chosen for.

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


class Map(NamedTuple):
    """A tensor (B, C, H, W) of any strides, as kernels take it; strides in elements."""

    data: Tensor
    stride_b: int
    stride_c: int
    stride_y: int
    stride_x: int


def map_of(x: Tensor) -> Map:
    return Map(x, *x.stride())


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a map are its contiguous dimension; layouts that are both count as planar."""
    return x.stride(1) == 1 and not x.is_contiguous()


def dot_precision(in_parts: bool = False) -> str:
    """How every float32 product of a kernel is computed: in TF32 if the user has allowed it to torch, else exactly, or,
    where a kernel's error budget allows it, ``in_parts``: on the same tensor cores in three TF32 products of the
    factors' high and low halves, which is float32 but for the last bits.
    """
    matmul = torch.backends.cuda.matmul
    # The newer of torch's two switches follows the older one, which raises once the newer has been used.
    precision = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if allowed else "tf32x3" if in_parts else "ieee"


@functools.lru_cache(64)
def architecture(device: torch.device) -> int:
    """Of a GPU, 90 for compute capability 9.0; elsewhere what Triton compiles for, or 0 if it interprets."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    try:
        return triton.runtime.driver.active.get_current_target().arch
    except RuntimeError:
        return 0


@triton.jit
def bound(n):
    """``n`` as the end of a loop's range: loops over ranges have their loads pipelined, unlike those of a condition."""
    return n


if not isinstance(bound, triton.JITFunction):

    def bound(n):
        """In the interpreter, whose scalars are arrays of one element, of which NumPy no longer makes an index."""
        return n.handle.data.item() if isinstance(n, tl.tensor) else n


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device and stream, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def power_of_two(n: int) -> int:
    """The least that is not below ``n``."""
    return 1 << (n - 1).bit_length()
