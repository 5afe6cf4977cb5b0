"""What a launcher may take for granted about the arguments of a registered op.

Every call of ``torch.ops.murf_fast.*`` passes the op's contract before a launcher sees it, whether it comes from
autograd, which hands on gradients as it finds them, or from anyone who calls the registered op. (The op's function has
checked its own arguments in the user's words.) Shapes, dtypes, devices, names and overlaps that a kernel would turn
into addresses are refused with a TypeError or ValueError. A contract lies beside its op; here is what they share.

A test costs about a tenth of a microsecond; words are looked for only once one fails.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from murf_fast.backends import AUTO, BackendUnavailableError
from murf_fast.ops import _checks
from murf_fast.ops._resize import Resize
from murf_fast.tables.resize import ANTIALIASED, MODES, scaled_size

# What kernels compute on; float64 runs through the reference.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def backend(op: str, backend: str, like: Tensor) -> None:
    if backend == "native":
        if not like.is_cpu:
            raise BackendUnavailableError(
                f"murf_fast.{op}: backend 'native' takes CPU tensors, these are on {like.device}"
            )
    elif backend == "triton":
        if not like.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise BackendUnavailableError(
                f"murf_fast.{op}: backend 'triton' takes CUDA tensors (and CPU tensors with TRITON_INTERPRET=1), these "
                f"are on {like.device}"
            )
    elif backend != AUTO:
        raise ValueError(f"murf_fast.{op}: `backend` must be 'native', 'triton' or 'auto', got {backend!r}")


def tensor(op: str, name: str, x: Tensor, like: Tensor, shape: Sequence[int | None], dtypes: Sequence[Any]) -> None:
    """A tensor on the device of ``like``; None in ``shape`` is any size, and ``dtypes`` are what it may have."""
    if x.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"murf_fast.{op}: `{name}` must be {names}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"murf_fast.{op}: `{name}` must be on {like.device}, got {x.device}")
    have = x.shape
    if len(have) != len(shape) or any(n is not None and n != m for n, m in zip(shape, have, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"murf_fast.{op}: `{name}` must have shape ({wanted}), got {tuple(have)}")


def map_(op: str, name: str, x: Tensor, kernels: str | None = None) -> None:
    """A map that kernels compute on, those of backend ``kernels``."""
    shape = x.shape
    if len(shape) != 4 or x.dtype not in DTYPES or not (shape[1] and shape[2] and shape[3]):
        _checks.map_(op, name, x)
        raise TypeError(f"murf_fast.{op}: `{name}` must be float32, bfloat16 or float16 for a kernel, got {x.dtype}")
    if kernels is not None:
        backend(op, kernels, x)


def maps(op: str, features: Sequence[Tensor], same_channels: bool, name: str = "features") -> None:
    if not features:
        raise TypeError(f"murf_fast.{op}: `{name}` must be a non-empty list of tensors (B, C, h, w)")
    first = features[0]
    map_(op, f"{name}[0]", first)
    if len(features) == 1:
        return
    dtype, on_cpu, (batch, channels, _, _) = first.dtype, first.is_cpu, first.shape
    for x in features[1:]:
        if x.ndim == 4 and x.dtype is dtype and (x.is_cpu if on_cpu else x.device == first.device):
            b, c, h, w = x.shape
            if b == batch and h and w and (c == channels if same_channels else c):
                continue
        _checks.maps(op, list(features), same_channels=same_channels, name=name)


def bias(op: str, bias: Tensor | None, features: Sequence[Tensor]) -> None:
    if bias is None:
        return
    first, shape = features[0], bias.shape
    fits = shape == first.shape[1:2] or shape == first.shape[:2]
    if not fits or bias.dtype not in _checks.DTYPES or bias.device != first.device:
        _checks.bias(op, bias, list(features))


def grid(op: str, name: str, size: Sequence[int]) -> None:
    if len(size) != 2 or size[0] < 1 or size[1] < 1:
        raise ValueError(f"murf_fast.{op}: `{name}` must be two positive integers, got {tuple(size)}")


def resize(op: str, resize: Resize) -> None:
    size, mode, antialias, via = resize
    if mode not in MODES or (antialias and mode not in ANTIALIASED):
        _checks.mode(op, mode, antialias)
    for name, pixels in (("size", size), ("via", via)):
        if pixels is not None:
            grid(op, name, pixels)


def sum_of_maps(op: str, features: Sequence[Tensor], offset: Tensor | None, how: Resize, kernels: str) -> None:
    """Maps of the same channels that come to one grid, their bias and their backend."""
    maps(op, features, same_channels=True)
    backend(op, kernels, features[0])
    bias(op, offset, features)
    resize(op, how)


def factors(op: str, factors: Sequence[float] | None, in_size: Sequence[int], out_size: Sequence[int]) -> None:
    """Factors that give the result its size: with others a table would point beyond the map."""
    if factors is None:
        return
    if len(factors) != 2 or not all(f > 0 and math.isfinite(f) for f in factors):
        raise ValueError(f"murf_fast.{op}: `scale_factor` must be two positive, finite numbers, got {tuple(factors)}")
    if any(scaled_size(n, f) != m for n, f, m in zip(in_size, factors, out_size, strict=True)):
        raise ValueError(
            f"murf_fast.{op}: `scale_factor` must give the {tuple(out_size)} pixels of the result, got "
            f"{tuple(factors)} of {tuple(in_size)}"
        )


def one_of(op: str, name: str, value: object, known: Sequence[Any]) -> None:
    if value not in known:
        raise ValueError(f"murf_fast.{op}: `{name}` must be one of {tuple(known)}, got {value!r}")


def count(op: str, name: str, values: Sequence[Any], count: int) -> None:
    if len(values) != count:
        raise ValueError(f"murf_fast.{op}: `{name}` must have {count} entries, got {len(values)}")


def out(op: str, out: Tensor, shape: Sequence[int], inputs: Sequence[Tensor | None]) -> None:
    with torch.no_grad():  # whether gradients are needed is for the op's function to ask
        _checks.out(op, out, shape, inputs)
