"""Window attention of heads that share values, on tiles with more than 64 keys: the averaged weights go through memory.

A program that held them would form them again for every block of channels that its registers take, with every head's
scores and exponentials: for 384 channels of float32 twelve times. Here they are formed once, and there are three
launches: every head's softmax numbers, the averages over the heads, and their products with the values. The weights of
as many tiles as fit WEIGHTS bytes are made, used, and overwritten by those of the next tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.best_class import best_class
from murf_fast.kernels.launch import bound, map_of
from murf_fast.kernels.products import product
from murf_fast.kernels.resample import bias_stride
from murf_fast.kernels.window_weights import (
    CELLS,
    Call,
    block_of,
    exponential_of,
    inverse_of,
    load_cells,
    members_of,
    partners_of,
    scores_of,
    shift_of,
    statistic_at,
    steps_of,
    store_cells,
    terms_of,
    tile_of,
)

WEIGHTS = 128 << 20  # bytes; several tiles for each multiprocessor, however many keys they have


class Numbers(NamedTuple):
    """Per tile, head and query, float32: what is subtracted from scores, and what their exponentials are scaled by."""

    shift: Tensor
    factor: Tensor


@dataclass(frozen=True)
class WeightsTile:
    """Channels of q and k at a time, warps and stages of the first two launches; channels of v, warps and stages of the
    third.
    """

    head_dim: int
    warps: int
    stages: int
    channels: int
    value_warps: int
    value_stages: int


def weights_tile(head_dim: int, width: int, dtype: torch.dtype, architecture: int) -> WeightsTile:
    """Scores of 64 x 64 are 32 registers of a thread of four warps, results of 64 x 64 or, of eight, of 64 x 128 as
    many, and the addresses of values in planes twice that. The parts of float32 products are twice as many again, of
    which sm_100 spilled some. More warps, channels or stages took longer on an H200 (float32: 9.5 ms of 1024 x 1024
    queries and 64 x 64 keys; two stages 23 ms, eight warps and 128 channels 13 ms).
    """
    if dtype == torch.float32:
        old, hopper = launch.without_warp_groups(architecture), 90 <= architecture < 100
        return WeightsTile(block_of(head_dim, 16 if old else 32), 4, 1, block_of(width, 64 if hopper else 32), 4, 1)
    return WeightsTile(block_of(head_dim, 64), 4, 2, block_of(width, 128), 8 if width > 64 else 4, 3)


@kernel
def _softmax_numbers(attention, numbers, lse, tiles, y_tiles, x_tiles, begin, WHOLE_D: tl.constexpr,
                     BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One head of a tile of queries, all its keys."""
    heads = attention.heads
    tile, head = tl.program_id(0) // heads.count, tl.program_id(0) % heads.count
    b, i, j = tile_of(begin + tile, y_tiles, x_tiles)
    mine = members_of(tiles, i, j)
    largest = tl.full((CELLS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((CELLS,), dtype=tl.float32)
    for step in range(bound(steps_of(tiles, i, j))):
        read = partners_of(tiles, i, j, step)
        s = scores_of(attention, b, head, mine, read, None, False, WHOLE_D, BLOCK_D, PRECISION)
        peak = tl.maximum(largest, tl.max(s, axis=1))
        shift = shift_of(peak)
        total = total * exponential_of(largest - shift) + tl.sum(exponential_of(s - shift[:, None]), axis=1)
        largest = peak
    at = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    tl.store(numbers.shift + at, shift_of(largest))
    tl.store(numbers.factor + at, inverse_of(total * heads.count))
    if lse is not None:
        tl.store(lse + statistic_at(attention, b, head, mine), largest + tl.log(total), mask=mine.inside)


@kernel
def _averaged_weights(attention, numbers, weights, tiles, y_tiles, x_tiles, begin, most_steps, WHOLE_D: tl.constexpr,
                      BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One step of a tile: its queries and 64 of their keys, averaged over the heads."""
    heads = attention.heads
    tile, step = tl.program_id(0) // most_steps, tl.program_id(0) % most_steps
    b, i, j = tile_of(begin + tile, y_tiles, x_tiles)
    if step < steps_of(tiles, i, j):
        mine, read = members_of(tiles, i, j), partners_of(tiles, i, j, step)
        term = terms_of(attention, 0, mine, read, False) if attention.terms.bias_rows is None else None
        mean = tl.zeros((CELLS, CELLS), dtype=tl.float32)
        for head in range(bound(heads.count)):
            s = scores_of(attention, b, head, mine, read, term, False, WHOLE_D, BLOCK_D, PRECISION)
            at = (tile * heads.count + head) * CELLS + tl.arange(0, CELLS)
            shift, factor = tl.load(numbers.shift + at), tl.load(numbers.factor + at)
            mean += exponential_of(s - shift[:, None]) * factor[:, None]
        tl.store(_weight_pointers(weights), mean.to(weights.dtype.element_ty))


@triton.jit
def _weight_pointers(weights):
    """Of the program's 64 queries by 64 keys."""
    row, column = tl.arange(0, CELLS)[:, None], tl.arange(0, CELLS)[None, :]
    return weights + tl.program_id(0).to(tl.int64) * (CELLS * CELLS) + row * CELLS + column


@triton.jit
def _product_with(attention, weights, tiles, b, i, j, c, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    """Channels c .. c + BLOCK_C of the queries of a tile, whose weights begin at ``weights``: (64, BLOCK_C) float32."""
    row, column = tl.arange(0, CELLS)[:, None], tl.arange(0, CELLS)[None, :]
    result = tl.zeros((CELLS, BLOCK_C), dtype=tl.float32)
    for step in range(bound(steps_of(tiles, i, j))):
        read = partners_of(tiles, i, j, step)
        p = tl.load(weights + step * (CELLS * CELLS) + row * CELLS + column)
        values = load_cells(attention.v, b, read, c, attention.heads.width, BLOCK_C)
        if values.dtype == tl.float32 and PRECISION == "tf32x3":
            result = product(p, values, result, PRECISION)
        else:
            result = tl.dot(p, values, result, input_precision=PRECISION)
    return result


@kernel
def _weighted_values(attention, weights, out, tiles, y_tiles, x_tiles, begin, most_steps, BLOCK_C: tl.constexpr,
                     PRECISION: tl.constexpr):  # fmt: skip
    """One tile of queries, BLOCK_C channels."""
    width = attention.heads.width
    c_tiles = tl.cdiv(width, BLOCK_C)
    tile, c = tl.program_id(0) // c_tiles, tl.program_id(0) % c_tiles * BLOCK_C
    b, i, j = tile_of(begin + tile, y_tiles, x_tiles)
    own = weights + tl.cast(tile, tl.int64) * most_steps * (CELLS * CELLS)
    result = _product_with(attention, own, tiles, b, i, j, c, BLOCK_C, PRECISION)
    store_cells(out, b, members_of(tiles, i, j), c, width, result, BLOCK_C)


@kernel
def _weighted_argmax(attention, weights, class_bias, class_bias_stride, labels, tiles, y_tiles, x_tiles, begin,
                     most_steps, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tile of queries, all classes."""
    width = attention.heads.width
    tile = tl.program_id(0)
    b, i, j = tile_of(begin + tile, y_tiles, x_tiles)
    own = weights + tl.cast(tile, tl.int64) * most_steps * (CELLS * CELLS)
    best = tl.full((CELLS,), float("-inf"), dtype=tl.float32)
    index = tl.zeros((CELLS,), dtype=tl.int32)
    for first in range(0, bound(width), BLOCK_C):
        logits = _product_with(attention, own, tiles, b, i, j, first, BLOCK_C, PRECISION)
        c = first + tl.arange(0, BLOCK_C)
        if class_bias is not None:
            row = class_bias + tl.cast(b, tl.int64) * class_bias_stride
            logits += tl.load(row + c, mask=c < width, other=0.0)[None, :]
        best, index = best_class(logits, c, width, best, index)
    mine, terms = members_of(tiles, i, j), attention.terms
    at = (tl.cast(b, tl.int64) * terms.height + mine.y) * terms.width + mine.x
    tl.store(labels + at, index.to(labels.dtype.element_ty), mask=mine.inside)


def window_attention_of_many_keys(call: Call, out: Tensor, lse: Tensor | None) -> None:
    """``out`` and ``lse`` as in :func:`murf_fast.kernels.window_attention`, on the device of the caller's context."""
    tile = _tile_of(call)
    c_tiles = launch.cdiv(call.attention.heads.width, tile.channels)
    for weights, count, place in _made(call, tile, lse):
        _weighted_values[(count * c_tiles,)](call.attention, weights, map_of(out), *place, **_options(tile))


def argmax_of_many_keys(call: Call, class_bias: Tensor | None, labels: Tensor) -> None:
    """``labels`` as in :func:`murf_fast.kernels.window_attention_argmax`."""
    tile = _tile_of(call)
    for weights, count, place in _made(call, tile, None):
        _weighted_argmax[(count,)](
            call.attention, weights, class_bias, bias_stride(class_bias), labels, *place, **_options(tile)
        )


def _tile_of(call: Call) -> WeightsTile:
    heads = call.attention.heads
    return weights_tile(heads.dim, heads.width, call.attention.v.data.dtype, launch.architecture(call.device))


def _options(tile: WeightsTile) -> dict:
    """Of a launch that multiplies values."""
    return {
        "BLOCK_C": tile.channels,
        "PRECISION": launch.dot_precision(in_parts=True),
        "num_warps": tile.value_warps,
        "num_stages": tile.value_stages,
        "maxnreg": 255,
    }


def _made(call: Call, tile: WeightsTile, lse: Tensor | None) -> Iterator[tuple[Tensor, int, tuple]]:
    """Weights of some tiles, how many tiles these are, and where they are; of the next ones in the same memory."""
    heads, values = call.attention.heads, call.attention.v.data
    rows, columns = call.axes()
    most_steps = rows.most_steps * columns.most_steps
    some = max(1, min(call.programs, WEIGHTS // (most_steps * CELLS.value**2 * values.element_size())))
    weights = values.new_empty((some, most_steps, CELLS.value, CELLS.value))
    numbers = Numbers(*(values.new_empty((some, heads.count, CELLS.value), dtype=torch.float32) for _ in range(2)))
    options = {
        "WHOLE_D": heads.dim <= tile.head_dim,
        "BLOCK_D": tile.head_dim,
        "PRECISION": launch.dot_precision(in_parts=True),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": 255,
    }
    for begin in range(0, call.programs, some):
        count, place = min(some, call.programs - begin), (call.tiles, *call.counts, begin)
        _softmax_numbers[(count * heads.count,)](call.attention, numbers, lse, *place, **options)
        _averaged_weights[(count * most_steps,)](call.attention, numbers, weights, *place, most_steps, **options)
        yield weights, count, (*place, most_steps)
