"""The search of a bank: a matrix product whose epilogue keeps, per query and lane, the smallest distance.

Lane j of a split sees rows j, j + lanes, ... Distances become integers that order like them and whose lowest bits name
the group of lanes a row is in, so that one minimum keeps value and place. What a lane gives up is remembered as one
minimum per query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.kernels.assembler import kernel

# Bits of a distance that give way to the group's number. Rounding towards zero by them is part of the bound.
GROUP_BITS = 10
INFINITY = tl.constexpr(0x7F800000)  # float32's, as an integer


@dataclass(frozen=True)
class ProductTile:
    """Queries times bank rows, which fall on so many lanes, ``depth`` columns at a time; warps, stages, registers."""

    queries: int
    rows: int
    lanes: int
    depth: int
    warps: int
    stages: int
    registers: int


def product_tile(dtype: torch.dtype, architecture: int) -> ProductTile:
    """Half dtypes: the L2 cache feeds 128 x 256 products with three quarters of the bytes that 128 x 128 ones take. On
    sm_90 the 128 registers of their sums and 64 of minima leave eight warps just enough (255 of 255, three stages are
    144 KB of shared memory). sm_80 keeps operands in registers beside the sums and sm_100 moves sums out of its tensor
    memory in another layout than that of the minima: both spill, and take 128 x 128; sm_120 does so even then at 64
    columns at a time.

    float32 is split in registers, three products for one: 128 x 64 took the fewest instructions per result on sm_90
    (7.6; 64 x 64 takes 9.0 and 64 x 128 twelve), and sm_80 spills at more than 16 columns at a time.
    """
    if dtype == torch.float32:
        if architecture < 90:
            return ProductTile(64, 128, 128, 16, 8, 2, 255)
        return ProductTile(128, 64, 64, 32, 8, 2, 255)
    return ProductTile(128, 256 if architecture == 90 else 128, 128, 32 if architecture == 120 else 64, 8, 3, 255)


def splits_of(queries: int, rows: int, tile: ProductTile) -> int:
    """Parts of the bank that are searched independently: enough programs for several waves on 132 multiprocessors,
    none with more groups than their numbers have bits for, few enough that candidates stay few.
    """
    programs = launch.cdiv(queries, tile.queries)
    wanted = max(launch.cdiv(4 * 132, programs), launch.cdiv(rows, (tile.lanes << GROUP_BITS) - tile.rows))
    return max(1, min(wanted, launch.cdiv(rows, tile.rows)))


class Found(NamedTuple):
    """What a search leaves behind: the smallest of every lane, and the smallest that was given up for others."""

    best: Tensor  # (queries, splits, lanes) int32
    rest: Tensor  # (queries, splits) int32
    split_rows: int


@kernel
def _nearest_distance(query, query_norms, bank, bank_norms, best_out, rest_out, queries, rows, split_rows, splits,
                      query_stride, bank_stride, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
                      LANES: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_BITS: tl.constexpr):  # fmt: skip
    # Programs that run together work on one split: they share its tiles in the second-level cache.
    q_tiles = tl.cdiv(queries, BLOCK_Q)
    split = tl.program_id(0) // q_tiles
    q = (tl.program_id(0) % q_tiles).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_inside = q < queries
    q_norm = tl.load(query_norms + q, mask=q_inside, other=0.0)
    begin = split.to(tl.int64) * split_rows
    end = tl.minimum(begin + split_rows, rows)
    best = tl.full([BLOCK_Q, LANES], INFINITY, dtype=tl.int32)
    rest = tl.full([BLOCK_Q], INFINITY, dtype=tl.int32)
    VALUE: tl.constexpr = -(1 << GROUP_BITS)
    group = 0
    while begin + group * LANES < end:
        m = begin + group * LANES + tl.arange(0, BLOCK_M)
        m_inside = m < end
        products = tl.zeros([BLOCK_Q, BLOCK_M], dtype=tl.float32)
        # A constant width: the compiler overlaps loads with products only in loops of this form.
        for d in range(0, DIM, BLOCK_D):
            c = d + tl.arange(0, BLOCK_D)
            a = tl.load(query + (q * query_stride)[:, None] + c[None, :], mask=q_inside[:, None], other=0.0)
            b = tl.load(bank + (m * bank_stride)[None, :] + c[:, None], mask=m_inside[None, :], other=0.0)
            # Whatever torch allows: the bound that proves an answer counts the roundings of this product
            # and no others. Who wants fewer digits asks for an index of bfloat16.
            products = tl.dot(a, b, products, input_precision="tf32x3")
        # Rows that do not exist are as far as those that nobody has seen.
        m_norm = tl.load(bank_norms + m, mask=m_inside, other=float("inf"))
        # Below zero by rounding only. Integers order negative numbers backwards, but the bound takes all for zero.
        distance = (q_norm[:, None] + m_norm[None, :] - 2.0 * products).to(tl.int32, bitcast=True)
        if BLOCK_M == LANES:
            packed = distance & VALUE | group
            rest = tl.minimum(rest, tl.min(tl.maximum(best, packed), axis=1))
            best = tl.minimum(best, packed)
        else:
            left, right = tl.split(tl.permute(tl.reshape(distance, [BLOCK_Q, 2, LANES]), (0, 2, 1)))
            left = left & VALUE | group
            right = right & VALUE | (group + 1)
            given_up = tl.maximum(best, left)
            best = tl.minimum(best, left)
            given_up = tl.minimum(given_up, tl.maximum(best, right))
            best = tl.minimum(best, right)
            rest = tl.minimum(rest, tl.min(given_up, axis=1))
        group += BLOCK_M // LANES
    lanes = tl.arange(0, LANES)
    out = best_out + ((q * splits + split) * LANES)[:, None] + lanes[None, :]
    tl.store(out, best, mask=q_inside[:, None])
    tl.store(rest_out + q * splits + split, rest, mask=q_inside)


def launch_nearest(query: Tensor, query_norms: Tensor, rows: Tensor, norms: Tensor) -> Found:
    with launch.on_device_of(query):
        tile = product_tile(query.dtype, launch.architecture(query.device))
        splits = splits_of(len(query), len(rows), tile)
        split_rows = launch.cdiv(launch.cdiv(len(rows), splits), tile.rows) * tile.rows
        best = torch.empty(len(query), splits, tile.lanes, dtype=torch.int32, device=query.device)
        rest = torch.empty(len(query), splits, dtype=torch.int32, device=query.device)
        _nearest_distance[(launch.cdiv(len(query), tile.queries) * splits,)](
            query,
            query_norms,
            rows,
            norms,
            best,
            rest,
            len(query),
            len(rows),
            split_rows,
            splits,
            query.stride(0),
            rows.stride(0),
            DIM=query.shape[1],
            BLOCK_Q=tile.queries,
            BLOCK_M=tile.rows,
            LANES=tile.lanes,
            BLOCK_D=tile.depth,
            GROUP_BITS=GROUP_BITS,
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.registers,
        )
    return Found(best, rest, split_rows)
