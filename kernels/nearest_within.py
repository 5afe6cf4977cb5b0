"""All rows of a bank that may be within a distance of a query: a matrix product whose epilogue lists what is near.

For the few queries that the lanes of the search do not settle. Whoever finds a row takes the next place of its query's
list, so that the order of a list is that of time; what is chosen from it is not.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.nearest_candidates import ROUNDING, Rounded, product_error
from murf_fast.kernels.nearest_search import ProductTile


def within_tile(dtype: torch.dtype, architecture: int) -> ProductTile:
    """Few queries wait for the bank's bytes: the smallest query tile that a warp group multiplies, and two or three
    programs per multiprocessor, whose loads and lists overlap. A lane per row, as nothing is given up.

    Triton 3.6 finds no layout for 64 rows of sums in sm_100's tensor memory in this kernel.
    """
    queries, warps = (128, 8) if 100 <= architecture < 120 else (64, 4)
    if dtype == torch.float32:
        return ProductTile(queries, 64, 64, 16 if architecture < 90 else 32, warps, 2, 255)
    return ProductTile(queries, 128, 128, 32 if architecture == 120 else 64, warps, 3, 255)


@kernel
def _nearest_within(query, query_norms, limits, bank, bank_norms, places, counts, queries, rows, first, width,
                    query_stride, bank_stride, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_D: tl.constexpr):  # fmt: skip
    # Programs that run together work on the same rows of the bank: they share them in the second-level cache.
    q_tiles = tl.cdiv(queries, BLOCK_Q)
    q = (tl.program_id(0) % q_tiles).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m = (tl.program_id(0) // q_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_inside, m_inside = q < queries, m < rows
    products = tl.zeros([BLOCK_Q, BLOCK_M], dtype=tl.float32)
    for d in range(0, DIM, BLOCK_D):
        c = d + tl.arange(0, BLOCK_D)
        a = tl.load(query + (q * query_stride)[:, None] + c[None, :], mask=q_inside[:, None], other=0.0)
        b = tl.load(bank + (m * bank_stride)[None, :] + c[:, None], mask=m_inside[None, :], other=0.0)
        # As in the search: the bound counts the roundings of this product.
        products = tl.dot(a, b, products, input_precision="tf32x3")
    q_norm = tl.load(query_norms + q, mask=q_inside, other=0.0)
    m_norm = tl.load(bank_norms + m, mask=m_inside, other=0.0)
    limit = tl.load(limits + q, mask=q_inside, other=0.0)
    distance = q_norm[:, None] + m_norm[None, :] - 2.0 * products
    near = ((distance <= limit[:, None]) & q_inside[:, None] & m_inside[None, :]).to(tl.int32)
    found = tl.sum(near, axis=1)
    # For every row of queries, found or not: as a branch, Triton 3.6 does not compile it for sm_100.
    begin = tl.atomic_add(counts + q, found, mask=found > 0, sem="relaxed")
    slot = begin[:, None] + tl.cumsum(near, axis=1) - 1
    at = places + (q * width)[:, None] + slot
    tl.store(at, tl.broadcast_to((first + m)[None, :], [BLOCK_Q, BLOCK_M]), mask=(near > 0) & (slot < width))


def limits_of(made: Rounded, last: Tensor, bank_limits: Tensor, dim: int) -> Tensor:
    """(Q,) float32: no row whose product gives a larger squared distance is as near as ``last`` (Q,), squared.

    The bound of :mod:`murf_fast.kernels.nearest_candidates` solved for d^2, and more than its own roundings added.
    """
    furthest = (last.sqrt() + made.errors + bank_limits[0]) * (1 + 2 * ROUNDING.value)
    return ((furthest.square() + product_error(made.squares + bank_limits[1], dim)) * (1 + 2.0**-20)).float()


def launch_within(
    query: Tensor, query_norms: Tensor, limits: Tensor, rows: Tensor, norms: Tensor, first: int, width: int
) -> tuple[Tensor, Tensor]:
    """Of every query at most ``width`` places of near rows (Q, width), of which ``rows`` begin with ``first``, and how
    many there are (Q,)."""
    queries, device = len(query), rows.device
    places = torch.empty(queries, width, dtype=torch.int64, device=device)
    counts = torch.zeros(queries, dtype=torch.int32, device=device)
    with launch.on_device_of(rows):
        tile = within_tile(rows.dtype, launch.architecture(rows.device))
        _nearest_within[(launch.cdiv(queries, tile.queries) * launch.cdiv(len(rows), tile.rows),)](
            query,
            query_norms,
            limits,
            rows,
            norms,
            places,
            counts,
            queries,
            len(rows),
            first,
            width,
            query.stride(0),
            rows.stride(0),
            DIM=rows.shape[1],
            BLOCK_Q=tile.queries,
            BLOCK_M=tile.rows,
            BLOCK_D=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.registers,
        )
    return places, counts
