"""What the launches of several kernels share. Tile choices lie beside their kernels: frozen results of pure functions
of shapes and dtypes. None of their numbers has been measured on a GPU yet; each says what it was chosen for.

Arguments that belong together are named tuples. One that holds tuples must hold nothing else: where it does, Triton 3.6
makes None of an integer that is 1 in the inner ones, once a loop has been entered.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
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


def dot_precision() -> str:
    """How every float32 product of a kernel is computed: in TF32 if the user has allowed it to torch, else exactly."""
    matmul = torch.backends.cuda.matmul
    # The newer of torch's two switches follows the older one, which raises once the newer has been used.
    precision = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if allowed else "ieee"


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device and stream, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up. Triton's own is made for kernels, too, and takes 3 us of a host that has 60 for a call."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def architecture() -> int:
    """Compute capability of the current device, 90 for 9.0, which is also what Triton's interpreter stands for."""
    return 90 if INTERPRETED else triton.runtime.driver.active.get_current_target().arch
