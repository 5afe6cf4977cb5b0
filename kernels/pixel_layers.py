"""What the kernels of one layer of a pointwise network share: reading, finishing and writing a tile of pixels."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """Pixels by inputs, of any strides."""

    data: Tensor
    stride_pixel: int
    stride_input: int


@triton.jit
def inputs_of(x, gain, offset, p, p_inside, i, i_inside):
    """Inputs i of pixels p, float32, normalized and activated if there is a ``gain``; 0 for inputs outside."""
    inside = p_inside[:, None] & i_inside[None, :]
    pointers = x.data + p.to(tl.int64)[:, None] * x.stride_pixel + i.to(tl.int64)[None, :] * x.stride_input
    v = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    if gain is not None:
        v = v * tl.load(gain + i, mask=i_inside, other=0.0)[None, :]
        v = v + tl.load(offset + i, mask=i_inside, other=0.0)[None, :]
        v = v / (1.0 + tl.exp(-v))
    return v


@triton.jit
def angles(rotate_rows, rotate_columns, p, inside, c, channels, width):
    """Cosine and sine of the angles of pixels p and channels c, by the addition theorem."""
    row = rotate_rows + (p // width)[:, None] * 2 * channels + c[None, :]
    column = rotate_columns + (p % width)[:, None] * 2 * channels + c[None, :]
    row_cosine, row_sine = tl.load(row, mask=inside, other=0.0), tl.load(row + channels, mask=inside, other=0.0)
    cosine, sine = tl.load(column, mask=inside, other=0.0), tl.load(column + channels, mask=inside, other=0.0)
    return row_cosine * cosine - row_sine * sine, row_sine * cosine + row_cosine * sine


@triton.jit
def turned(first, second, rotate_rows, rotate_columns, p, inside, c, half, channels, width):
    """Channels c and those with ``half`` more, turned by the angles of their pixels."""
    cosine, sine = angles(rotate_rows, rotate_columns, p, inside, c, channels, width)
    result = first * cosine - second * sine
    cosine, sine = angles(rotate_rows, rotate_columns, p, inside, c + half, channels, width)
    return result, second * cosine + first * sine


@triton.jit
def finished(y, bias, residual, p, inside, c, c_inside, channels):
    """With bias and residual."""
    if bias is not None:
        y += tl.load(bias + c, mask=c_inside, other=0.0)[None, :]
    if residual is not None:
        at = p.to(tl.int64)[:, None] * channels + c[None, :]
        y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def written(y, out, out_stride, statistics, tile, p, inside, c, c_inside, channels, count):
    """Stores channels c of a tile, and mean and summed squared differences of each over the pixels of the tile."""
    at = p.to(tl.int64)[:, None] * out_stride + c[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)
    if statistics is not None:
        mean = tl.sum(tl.where(inside, y, 0.0), axis=0) / count
        difference = tl.where(inside, y - mean[None, :], 0.0)
        to = statistics + tile.to(tl.int64) * 2 * channels + c
        tl.store(to, mean, mask=c_inside)
        tl.store(to + channels, tl.sum(difference * difference, axis=0), mask=c_inside)
