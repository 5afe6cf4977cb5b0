"""AnyUp's feature-agnostic layer and its gradients, pixel by pixel: no channels x filters maps.

A pixel's responses are C M numbers, read as rows i (the outputs) of columns j (what is averaged); the softmax goes over
the rows of a column. As released, element (i, j) is response i C + j in the order (channel, filter); in the paper it is
filter i of channel j.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.kernels.launch import map_of

__all__ = ["feature_unify", "feature_unify_backward"]


@dataclass(frozen=True)
class UnifyTile:
    """Filters and channels of one pixel worked on at a time, warps, and registers a thread at most."""

    filters: int
    channels: int
    warps: int
    registers: int


def unify_tile(filters: int) -> UnifyTile:
    """All filters, for the softmax goes over them, and 2048 responses: 16 values a thread."""
    block = launch.power_of_two(filters)
    return UnifyTile(block, max(2048 // block, 1), 4, 168)


class Columns(NamedTuple):
    """What gradients need of every column's softmax, (B, h, w, C) float32; ``delta`` is the mean of the result's
    gradients under its weights.
    """

    largest: Tensor
    total: Tensor
    delta: Tensor


@triton.jit
def _pixel(map, b, y, x):
    """Pointer to channel 0."""
    return map.data + b.to(tl.int64) * map.stride_b + y.to(tl.int64) * map.stride_y + x.to(tl.int64) * map.stride_x


@triton.jit
def _patch(features, b, y, x, c, c_inside, t, height, width, KERNEL: tl.constexpr):
    """Tap t (tensors of one shape) of channels c of a pixel; 0 outside the image."""
    row, column = y + t // KERNEL - KERNEL // 2, x + t % KERNEL - KERNEL // 2
    inside = c_inside & (t < KERNEL * KERNEL) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    pointers = features.data + b.to(tl.int64) * features.stride_b + c.to(tl.int64) * features.stride_c
    pointers += row.to(tl.int64) * features.stride_y + column.to(tl.int64) * features.stride_x
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _taps_inside(y, x, height, width, KERNEL: tl.constexpr):
    rows = tl.minimum(y + KERNEL // 2, height - 1) - tl.maximum(y - KERNEL // 2, 0) + 1
    columns = tl.minimum(x + KERNEL // 2, width - 1) - tl.maximum(x - KERNEL // 2, 0) + 1
    return (rows * columns).to(tl.float32)


@triton.jit
def _feature_unify(features, basis, out, grad, columns, channels, height, width, filters,
                   RELEASED: tl.constexpr, KERNEL: tl.constexpr, FILTERS: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """The layer at one pixel; with ``grad`` instead what its gradients need of every column (B, h, w, C)."""
    program = tl.program_id(0)
    b, y, x = program // width // height, program // width % height, program % width
    i = tl.arange(0, FILTERS)
    i_inside = i < filters
    share = _taps_inside(y, x, height, width, KERNEL)
    # Each channel adds what is small beside the sum of a thousand: float32 would lose the digits that AnyUp needs.
    mean = tl.zeros((FILTERS,), dtype=tl.float64)
    if grad is not None:
        at = _pixel(grad, b, y, x)
        upstream = tl.load(at + i.to(tl.int64) * grad.stride_c, mask=i_inside, other=0.0).to(tl.float32)
    start = 0
    while start < channels:
        j = start + tl.arange(0, BLOCK)
        inside = i_inside[:, None] & (j < channels)[None, :]
        if RELEASED:
            flat = i[:, None] * channels + j[None, :]
            c, m = flat // filters, flat % filters
        else:
            c, m = tl.zeros_like(i)[:, None] + j[None, :], i[:, None] + tl.zeros_like(j)[None, :]
        responses = tl.zeros((FILTERS, BLOCK), dtype=tl.float32)
        t = 0
        while t < KERNEL * KERNEL:
            weight = tl.load(basis + m * KERNEL * KERNEL + t, mask=inside, other=0.0)
            responses += weight * _patch(features, b, y, x, c, inside, tl.zeros_like(c) + t, height, width, KERNEL)
            t += 1
        responses = tl.where(i_inside[:, None], responses / share, float("-inf"))
        peak = tl.max(responses, axis=0)
        mass = tl.exp(responses - peak[None, :])
        sums = tl.sum(mass, axis=0)
        weights = tl.where(inside, mass / sums[None, :], 0.0)
        if grad is None:
            mean += tl.sum(weights, axis=1).to(tl.float64)
        else:
            at_j = program.to(tl.int64) * channels + j
            tl.store(columns.largest + at_j, peak, mask=j < channels)
            tl.store(columns.total + at_j, sums, mask=j < channels)
            tl.store(columns.delta + at_j, tl.sum(weights * upstream[:, None], axis=0), mask=j < channels)
        start += BLOCK
    if grad is None:
        at = _pixel(out, b, y, x)
        result = (mean / channels).to(tl.float32)
        tl.store(at + i.to(tl.int64) * out.stride_c, result.to(out.data.dtype.element_ty), mask=i_inside)


@triton.jit
def _response_gradients(features, basis, grad, columns, b, y, x, c, m, inside, channels, height, width,
                        filters, RELEASED: tl.constexpr, KERNEL: tl.constexpr, ROWS: tl.constexpr,
                        COLUMNS: tl.constexpr):  # fmt: skip
    """Gradients of the correlations of channels c with filters m at one pixel, (ROWS, COLUMNS)."""
    responses = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    t = 0
    while t < KERNEL * KERNEL:
        weight = tl.load(basis + m * KERNEL * KERNEL + t, mask=inside, other=0.0)
        responses += weight * _patch(features, b, y, x, c, inside, tl.zeros_like(c) + t, height, width, KERNEL)
        t += 1
    share = _taps_inside(y, x, height, width, KERNEL)
    if RELEASED:
        flat = c * filters + m
        i, j = flat // channels, flat % channels
    else:
        i, j = m, c
    at = ((b * height + y).to(tl.int64) * width + x) * channels + j
    peak = tl.load(columns.largest + at, mask=inside, other=0.0)
    p = tl.exp(responses / share - peak) / tl.load(columns.total + at, mask=inside, other=1.0)
    pointers = _pixel(grad, b, y, x)
    upstream = tl.load(pointers + i.to(tl.int64) * grad.stride_c, mask=inside, other=0.0).to(tl.float32)
    upstream -= tl.load(columns.delta + at, mask=inside, other=0.0)
    return tl.where(inside, p * upstream / (share * channels), 0.0)


@triton.jit
def _feature_unify_grad_features(features, basis, grad, columns, result, channels, height, width,
                                 filters, RELEASED: tl.constexpr, KERNEL: tl.constexpr, FILTERS: tl.constexpr,
                                 BLOCK: tl.constexpr):  # fmt: skip
    """Channels of one pixel gather from the pixels whose patches hold it, in their order: deterministic."""
    c_tiles = tl.cdiv(channels, BLOCK)
    pixel = tl.program_id(0) // c_tiles
    b, y, x = pixel // width // height, pixel // width % height, pixel % width
    own = (tl.program_id(0) % c_tiles) * BLOCK + tl.arange(0, BLOCK)
    filter = tl.arange(0, FILTERS)
    inside = (own < channels)[:, None] & (filter < filters)[None, :]
    c = own[:, None] + tl.zeros_like(filter)[None, :]
    m = tl.zeros_like(own)[:, None] + filter[None, :]
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    t = 0
    while t < KERNEL * KERNEL:
        row, column = y - t // KERNEL + KERNEL // 2, x - t % KERNEL + KERNEL // 2
        if (row >= 0) & (row < height) & (column >= 0) & (column < width):
            ds = _response_gradients(features, basis, grad, columns, b, row, column, c, m, inside,
                                     channels, height, width, filters, RELEASED, KERNEL, BLOCK, FILTERS)  # fmt: skip
            weight = tl.load(basis + m * KERNEL * KERNEL + t, mask=inside, other=0.0)
            sums += tl.sum(ds * weight, axis=1)
        t += 1
    at = _pixel(result, b, y, x)
    tl.store(at + own.to(tl.int64) * result.stride_c, sums.to(result.data.dtype.element_ty), mask=own < channels)


@triton.jit
def _feature_unify_grad_basis(features, basis, grad, columns, result, channels, height, width, filters,
                              RELEASED: tl.constexpr, KERNEL: tl.constexpr, BLOCK_M: tl.constexpr,
                              BLOCK: tl.constexpr, TAPS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One image row's part of the gradient of a tile of filters: result (B h, M, TAPS)."""
    m_tiles = tl.cdiv(filters, BLOCK_M)
    line = tl.program_id(0) // m_tiles
    b, y = line // height, line % height
    filter = (tl.program_id(0) % m_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    tap = tl.arange(0, TAPS)
    sums = tl.zeros((BLOCK_M, TAPS), dtype=tl.float32)
    x = line * 0
    while x < width:
        start = line * 0
        while start < channels:
            own = start + tl.arange(0, BLOCK)
            inside = (filter < filters)[:, None] & (own < channels)[None, :]
            c = tl.zeros_like(filter)[:, None] + own[None, :]
            m = filter[:, None] + tl.zeros_like(own)[None, :]
            ds = _response_gradients(features, basis, grad, columns, b, y, x, c, m, inside, channels,
                                     height, width, filters, RELEASED, KERNEL, BLOCK_M, BLOCK)  # fmt: skip
            rows = own[:, None] + tl.zeros_like(tap)[None, :]
            taps = tl.zeros_like(own)[:, None] + tap[None, :]
            patches = _patch(features, b, y, x, rows, rows < channels, taps, height, width, KERNEL)
            sums = tl.dot(ds, patches, sums, input_precision=PRECISION)
            start += BLOCK
        x += 1
    at = (line.to(tl.int64) * filters + filter)[:, None] * TAPS + tap[None, :]
    tl.store(result + at, sums, mask=(filter < filters)[:, None] & (tap < TAPS)[None, :])


def feature_unify(features: Tensor, basis: Tensor, released: bool, out: Tensor) -> None:
    """``out`` (B, M, h, w) of the ``features`` (B, C, h, w) and the ``basis`` (M, 1, K, K), float32; see the op."""
    batch, channels, height, width = features.shape
    tile = unify_tile(len(basis))
    with launch.on_device_of(out):
        _feature_unify[(batch * height * width,)](
            map_of(features), basis, map_of(out), None, None, channels, height, width, len(basis),
            RELEASED=released, KERNEL=basis.shape[-1], FILTERS=tile.filters, BLOCK=tile.channels,
            num_warps=tile.warps, maxnreg=tile.registers,
        )  # fmt: skip


def feature_unify_backward(
    grad: Tensor, features: Tensor, basis: Tensor, released: bool, shares: int, results: list[Tensor]
) -> None:
    """``results``: gradients of features and (float32) basis; an empty one is not wanted."""
    batch, channels, height, width = features.shape
    filters, kernel = len(basis), basis.shape[-1]
    tile = unify_tile(filters)
    columns = Columns(*(features.new_empty((batch, height, width, channels), dtype=torch.float32) for _ in range(3)))
    sizes = (channels, height, width, filters)
    options = {"RELEASED": released, "KERNEL": kernel, "num_warps": tile.warps, "maxnreg": tile.registers}
    inputs = (map_of(features), basis, map_of(grad), columns)
    with launch.on_device_of(grad):
        _feature_unify[(batch * height * width,)](
            map_of(features), basis, None, map_of(grad), columns, *sizes, FILTERS=tile.filters,
            BLOCK=tile.channels, **options,
        )  # fmt: skip
        if results[0].numel():
            programs = batch * height * width * triton.cdiv(channels, tile.channels)
            _feature_unify_grad_features[(programs,)](
                *inputs, map_of(results[0]), *sizes, FILTERS=tile.filters, BLOCK=tile.channels, **options
            )
        if results[1].numel():
            taps = max(triton.next_power_of_2(kernel * kernel), 16)
            parts = features.new_empty((batch * height, filters, taps), dtype=torch.float32)
            _feature_unify_grad_basis[(batch * height * triton.cdiv(filters, 16),)](
                *inputs, parts, *sizes, BLOCK_M=16, BLOCK=16, TAPS=taps, PRECISION=launch.dot_precision(), **options
            )
            results[1].copy_(parts.sum(0)[:, : kernel * kernel].reshape(basis.shape))
