"""A search that skips cells of the bank: the product of :mod:`murf_fast.kernels.nearest_search`, whose tiles of queries
walk lists of blocks of rows instead of all rows.

The bank's rounded rows lie cell by cell (:mod:`murf_fast.tables.nearest_cells`), a block is as many of them as there
are lanes. Queries are sorted by their nearest centre, so that those of a tile want much the same cells. A tile looks at
the blocks in which rows of the cells of its nearest centres lie, which bounds how far the k-th row of each query can
be; then at those of the other cells that the triangle inequality does not prove farther. What the two find is proven
as that of a plain search is. So no pair is looked at twice, and where nothing can be skipped the two are a plain search
in two launches: nobody has to be asked first whether cells pay.

Lists, sorted queries and what is looked at stay on the device; the host waits for none of it.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.nearest_search import GROUP_BITS, INFINITY, Found, ProductTile, product_tile, splits_of
from murf_fast.tables.nearest_cells import Cells


class Blocks(NamedTuple):
    """Blocks of rows that tiles of queries look at: of tile t the first ``counts[t]`` of ``numbers[t]``, rising."""

    numbers: Tensor  # (tiles, blocks of the bank) int32
    counts: Tensor  # (tiles,) int32
    order: Tensor  # (tiles,) int32: tiles by falling counts


@kernel
def _nearest_cells(query, query_norms, bank, bank_norms, blocks, best_out, rest_out, queries, rows, width, splits,
                   query_stride, bank_stride, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, LANES: tl.constexpr,
                   BLOCK_D: tl.constexpr, GROUP_BITS: tl.constexpr):  # fmt: skip
    # Long lists first, so that short ones fill what the last of them leave of the chip.
    tile = tl.load(blocks.order + tl.program_id(0) // splits)
    split = tl.program_id(0) % splits
    q = tile.to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_inside = q < queries
    q_norm = tl.load(query_norms + q, mask=q_inside, other=0.0)
    count = tl.load(blocks.counts + tile)
    share = tl.cdiv(count, splits)
    begin = split * share
    end = tl.minimum(begin + share, count)
    numbers = blocks.numbers + tile.to(tl.int64) * width
    best = tl.full([BLOCK_Q, LANES], INFINITY, dtype=tl.int32)
    rest = tl.full([BLOCK_Q], INFINITY, dtype=tl.int32)
    VALUE: tl.constexpr = -(1 << GROUP_BITS)
    group = 0
    while begin + group < end:
        m = tl.load(numbers + begin + group).to(tl.int64) * LANES + tl.arange(0, LANES)
        m_inside = m < rows
        products = tl.zeros([BLOCK_Q, LANES], dtype=tl.float32)
        # As in the plain search, whose bound proves these answers, too.
        for d in range(0, DIM, BLOCK_D):
            c = d + tl.arange(0, BLOCK_D)
            a = tl.load(query + (q * query_stride)[:, None] + c[None, :], mask=q_inside[:, None], other=0.0)
            b = tl.load(bank + (m * bank_stride)[None, :] + c[:, None], mask=m_inside[None, :], other=0.0)
            products = tl.dot(a, b, products, input_precision="tf32x3")
        m_norm = tl.load(bank_norms + m, mask=m_inside, other=float("inf"))
        distance = (q_norm[:, None] + m_norm[None, :] - 2.0 * products).to(tl.int32, bitcast=True)
        packed = distance & VALUE | group
        rest = tl.minimum(rest, tl.min(tl.maximum(best, packed), axis=1))
        best = tl.minimum(best, packed)
        group += 1
    lanes = tl.arange(0, LANES)
    out = best_out + ((q * splits + split) * LANES)[:, None] + lanes[None, :]
    tl.store(out, best, mask=q_inside[:, None])
    tl.store(rest_out + q * splits + split, rest, mask=q_inside)


@kernel
def _nearest_named(places, counts, blocks, names, out, splits, width, wanted, BLOCK_Q: tl.constexpr,
                   LANES: tl.constexpr, GROUP_BITS: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Rows of the bank for places that count split, group and lane of a query's list."""
    q = tl.program_id(0).to(tl.int64)
    tile = q // BLOCK_Q
    share = tl.cdiv(tl.load(blocks.counts + tile), splits)
    count = tl.minimum(tl.load(counts + q), wanted)
    first = 0
    while first < count:
        n = first + tl.arange(0, BLOCK_N)
        place = tl.load(places + q * wanted + n, mask=n < count, other=0)
        split, group = place // (LANES << GROUP_BITS), place // LANES % (1 << GROUP_BITS)
        number = tl.load(blocks.numbers + tile * width + split * share + group, mask=n < count, other=0)
        name = tl.load(names + number.to(tl.int64) * LANES + place % LANES, mask=n < count, other=0)
        tl.store(out + q * wanted + n, name, mask=n < count)
        first += BLOCK_N


def cells_tile(dtype: torch.dtype, architecture: int) -> ProductTile:
    """That of the plain search with a lane per row: a block is met at once, and sm_90 has no registers left for the
    numbers of two of them beside the sums and minima of 128 x 256 products (56 bytes of them were spilled).
    """
    tile = product_tile(dtype, architecture)
    return dataclasses.replace(tile, rows=tile.lanes)


class Launcher:
    """The launches for sorted queries: how many to a tile, rows to a block, programs to a tile's list.

    Prediction for an H100, not measured: a program walks its list at the rate of the plain search, as a block's number
    is one load in front of hundreds of products; where the tiles' lists hold a tenth of the blocks, and no tile's many
    times as many as another's, a search takes about a tenth of a plain one and the fixed part. That is some 60
    small launches, which the host hands out in 0.3 to 0.6 ms, and per query and cell 2 D float64 operations and some
    150 bytes: 0.2 ms for 2048 queries, 1024 cells and 768 columns. So below about 2 ms a plain search is as fast.
    """

    def __init__(self, low: Tensor, queries: int) -> None:
        self.queries, self.rows = queries, len(low)
        self.tile = cells_tile(low.dtype, launch.architecture(low.device))
        self.tiles = launch.cdiv(queries, self.tile.queries)
        self.blocks = launch.cdiv(self.rows, self.tile.lanes)
        # Of the longest list that there can be: all blocks.
        self.splits = splits_of(queries, self.rows, self.tile)

    def active(self, wanted: Tensor, cells: Cells) -> Tensor:
        """(tiles, blocks) bool: which have rows of a cell that a query of the tile wants; ``wanted`` (Q, N) bool."""
        padded = F.pad(wanted, (0, 0, 0, self.tiles * self.tile.queries - self.queries))
        of_tiles = padded.view(self.tiles, self.tile.queries, -1).any(1)
        first = torch.arange(self.blocks, dtype=torch.int64, device=wanted.device) * self.tile.lanes
        last = (first + self.tile.lanes - 1).clamp_(max=self.rows - 1)
        # A block's cells follow one another.
        before = F.pad(of_tiles.cumsum(1), (1, 0))
        begin, end = (torch.searchsorted(cells.begins, at, right=True) for at in (first, last))
        return before[:, end] > before[:, begin - 1]

    def listed(self, active: Tensor) -> Blocks:
        counts = active.sum(1)
        # Those that are not active go behind the end.
        at = torch.where(active, active.cumsum(1) - 1, self.blocks)
        number = torch.arange(self.blocks, dtype=torch.int32, device=active.device).expand_as(at)
        numbers = torch.zeros(self.tiles, self.blocks + 1, dtype=torch.int32, device=active.device)
        numbers = numbers.scatter_(1, at, number)
        return Blocks(numbers, counts.int(), counts.argsort(descending=True, stable=True).int())

    def looked_at(self, active: Tensor) -> Tensor:
        """Pairs of queries and rows, float64, on the device."""
        queries = torch.full((self.tiles,), self.tile.queries, dtype=torch.float64, device=active.device)
        queries[-1] = self.queries - (self.tiles - 1) * self.tile.queries
        rows = torch.full((self.blocks,), self.tile.lanes, dtype=torch.float64, device=active.device)
        rows[-1] = self.rows - (self.blocks - 1) * self.tile.lanes
        return queries @ active.double() @ rows

    def search(self, query: Tensor, query_norms: Tensor, low: Tensor, norms: Tensor, blocks: Blocks) -> Found:
        """Places count ``lanes << GROUP_BITS`` rows to a split, whatever it has; see :meth:`named`."""
        tile, device = self.tile, query.device
        best = torch.empty(len(query), self.splits, tile.lanes, dtype=torch.int32, device=device)
        rest = torch.empty(len(query), self.splits, dtype=torch.int32, device=device)
        with launch.on_device_of(query):
            _nearest_cells[(self.tiles * self.splits,)](
                query,
                query_norms,
                low,
                norms,
                blocks,
                best,
                rest,
                len(query),
                len(low),
                blocks.numbers.shape[1],
                self.splits,
                query.stride(0),
                low.stride(0),
                DIM=query.shape[1],
                BLOCK_Q=tile.queries,
                LANES=tile.lanes,
                BLOCK_D=tile.depth,
                GROUP_BITS=GROUP_BITS,
                num_warps=tile.warps,
                num_stages=tile.stages,
                maxnreg=tile.registers,
            )
        return Found(best, rest, tile.lanes << GROUP_BITS)

    def named(self, places: Tensor, counts: Tensor, blocks: Blocks, cells: Cells) -> Tensor:
        """Rows of the bank (Q, wanted) for the places of candidates; zeros behind the ``counts`` of each query."""
        queries, wanted = places.shape
        out = torch.zeros_like(places)
        with launch.on_device_of(places):
            _nearest_named[(queries,)](
                places,
                counts,
                blocks,
                cells.rows,
                out,
                self.splits,
                blocks.numbers.shape[1],
                wanted,
                BLOCK_Q=self.tile.queries,
                LANES=self.tile.lanes,
                GROUP_BITS=GROUP_BITS,
                BLOCK_N=min(launch.power_of_two(wanted), 128),
                num_warps=1,
            )
        return out
