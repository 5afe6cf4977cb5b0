"""Where tensors lie, for kernels: the last word about dtype, device and shape before an address is taken.

Calls of the extension and its structs (csrc/types.h) take keywords only: a swapped field is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from murf_fast._extension import module

extension = module()

# Bytes from which a result is worth a system call about its pages.
_LARGE = 8 << 20
_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def address(x: Tensor | None, dtype: torch.dtype, elements: int) -> int:
    """Where the dense ``x`` begins, which has so many elements or more; 0 for None."""
    if x is None:
        return 0
    if x.dtype is not dtype or not x.is_cpu or x.numel() < elements or not x.is_contiguous():
        refuse(x, dtype, f"contiguous with {elements} elements or more")
    return x.data_ptr() or no_memory(x)


def dense(x: Tensor, dtype: torch.dtype) -> tuple[int, bool]:
    """Where a map begins that is dense in one of the two layouts, and whether that is channels_last and not both."""
    channels_last = not x.is_contiguous()
    if x.dtype is not dtype or not x.is_cpu:
        refuse(x, dtype, "contiguous or channels_last")
    if channels_last and not x.is_contiguous(memory_format=torch.channels_last):
        refuse(x, dtype, "contiguous or channels_last")
    return x.data_ptr() or no_memory(x), channels_last


def place(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> int:
    """Where ``x`` of any strides begins; ``shape`` is what the kernel walks."""
    if x.dtype is not dtype or not x.is_cpu or (shape is not None and x.shape != shape):
        refuse(x, dtype, shape)
    return x.data_ptr() or no_memory(x)


def rows_at(x: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Where rows begin that lie apart, each of them dense."""
    if x.dtype is not dtype or not x.is_cpu or x.ndim != 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        refuse(x, dtype, "dense rows")
    return x.data_ptr() or no_memory(x)


def strided(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> Any:
    """A map (B, C, H, W) of any strides; ``shape`` is what the kernel walks."""
    if x.dtype is not dtype or not x.is_cpu or (shape is not None and x.shape != shape):
        refuse(x, dtype, shape)
    return extension.Strided(data=x.data_ptr() or no_memory(x), strides=x.stride())


def wanted(result: Tensor, like: Tensor) -> Any:
    """A gradient's strided map; nowhere for one that is empty because nobody wants it."""
    if result.numel():
        return strided(result, like.dtype, like.shape)
    return extension.Strided(data=0, strides=(0, 0, 0, 0))


def rows_of(x: Tensor, scale: Tensor | None = None) -> Any:
    """Rows as the kernels of searches take them; their entries are contiguous. An empty scale stands for ones."""
    (rows, dim), (stride, step) = x.shape, x.stride()
    if not x.is_cpu or x.is_neg() or (step != 1 and dim > 1):
        refuse(x, x.dtype, "contiguous rows without a negative bit")
    scaled = scale is not None and scale.numel() > 0
    return extension.NearestRows(
        data=x.data_ptr() or no_memory(x),
        dtype=dtype_tag(x.dtype),
        rows=rows,
        dim=dim,
        stride=stride,
        scale=address(scale, torch.float64, rows) if scaled else 0,
    )


def same_shape(x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        refuse(x, x.dtype, tuple(shape))


def no_memory(x: Tensor) -> int:
    """The address of nothing; a fake tensor has no other."""
    if x.numel():
        raise ValueError(f"murf_fast: a kernel was to be given a tensor without memory, {type(x).__name__}")
    return 0


def refuse(x: Tensor, dtype: torch.dtype, expected: object) -> None:
    raise (TypeError if x.dtype is not dtype else ValueError)(
        f"murf_fast: a kernel was to be given {dtype} on the CPU, {expected}, and got {x.dtype} on {x.device}, shape "
        f"{tuple(x.shape)}, strides {x.stride() if x.layout is torch.strided else x.layout}"
    )


def dtype_tag(dtype: torch.dtype) -> str:
    """The extension's name of a dtype."""
    tag = _DTYPES.get(dtype)
    if tag is None:
        raise TypeError(f"murf_fast: a kernel takes float32, bfloat16 or float16, got {dtype}")
    return tag


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a kernel: of a named dtype on the CPU, whatever the process's defaults are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def prefer_huge_pages(out: Tensor) -> None:
    if out.nbytes >= _LARGE:
        extension.prefer_huge_pages(out.data_ptr(), out.nbytes)
