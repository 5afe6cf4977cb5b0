"""The CPU search behind ``nearest_distance``: blocks of one matrix product, each reduced before the next is made.

A prepared row is rounded to the product's dtype and followed by six columns that hold its squared norm, so that the
product itself is ``-d^2 / 2`` between rounded rows. csrc/level/nearest_distance.cpp says what happens to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.native import _nearest_kernels as kernels
from murf_fast.native._address import empty, extension
from murf_fast.tables.nearest_cells import (
    ENTRIES,
    Cells,
    Rows,
    first_cells,
    lower_bounds,
    squared_distances,
)

__all__ = [
    "extended_index",
    "has_bf16_products",
    "index_layout",
    "nearest_distance",
    "nearest_distance_cells",
    "nearest_index",
]

# A block of products is 4 MB in bfloat16 and 8 MB in float32: it is read again at once, from the last-level cache.
# Larger blocks did not raise the rate of the products.
BANK_BLOCK = 1024
QUERY_BLOCK = 2048
# The bank is read once for so many queries. Their candidates are 13 MB.
QUERIES = 8192
CANDIDATES = 128
# Entries of the matrix of queries and cells: 32 MB in float64.
CELL_ENTRIES = 1 << 22
# Beyond this share of the rows a scan of all is faster: gathered queries and small products cost twice as much a pair.
PAYS = 1 / 3
# A scan for fewer queries takes no longer than some fifteen times what it takes to find out.
FEW_QUERIES = 256
# So many queries, at most, are asked whether it does.
ASKED = 32
# Beyond this, squares are near the end of float32.
LARGEST_SQUARED_NORM = 1e36
# Unit roundoff of a rounding to bfloat16 with room; results in float32 are covered by the bound of the sum.
BFLOAT16_ROUNDING = 2.0**-7

Arrange = Callable[[Tensor, Tensor], Cells]


def has_bf16_products() -> bool:
    """Whether this processor multiplies matrices in bfloat16 faster than in float32."""
    return extension.has_bf16_products()


def _resolved(precision: str) -> torch.dtype:
    """The dtype of the bank's copy; float32 stands for none."""
    if precision == "auto":
        return torch.bfloat16 if has_bf16_products() else torch.float32
    return getattr(torch, precision)


def nearest_index(
    bank: Tensor, metric: str, precision: str, device: torch.device, arrange: Arrange | None = None
) -> list[Tensor]:
    """[mean (D,), row scales (R,), low-precision rows (R, D or more), errors per block, squared norms per block];
    unused ones are empty. The device is the bank's. ``arrange`` makes cells, which are the blocks then, of mean and
    scales. Of inner products, which a mean would change, it is zero.
    """
    with _fork.calling_thread_only():
        mean, scale = _statistics(bank, metric)
        cells = arrange(mean, scale) if arrange else None
        return [mean, scale, *_copy(bank, mean, scale, _resolved(precision), cells)]


def extended_index(
    bank: Tensor, index: list[Tensor], metric: str, begin: int, arrange: Arrange | None = None
) -> list[Tensor]:
    """The index of ``bank``, whose rows from ``begin`` on are not in ``index`` yet.

    The mean stays, so that what was prepared is not prepared again.
    """
    mean, scale, low, errors, squares = index
    more = bank[begin:]
    norms = _squared_norms(more, "rows", 0, metric == "cosine")
    if metric == "cosine":
        scale = torch.cat([scale, _norms_to_scale(norms)])
    cells = arrange(mean, scale) if arrange else None
    if not low.numel():
        blocks = len(_pieces(len(bank), cells))
        return [mean, scale, low, _zeros(blocks), _zeros(blocks)]
    own = empty((len(more), low.shape[1]), low.dtype)
    role = _role(low, bank.shape[1])
    norm, error = kernels.prepare(more, mean, _part(scale, slice(begin, None)), own, role)
    _check_low(norm, "rows", low.dtype)
    low = torch.cat([low, own])
    if cells is None:
        block = torch.arange(begin, len(bank), dtype=torch.int64, device="cpu") // BANK_BLOCK
        count = len(_pieces(len(bank), None))
        errors, squares = (torch.cat([x, _zeros(count - len(x))]) for x in (errors, squares))
    else:
        # Old rows keep their order, new ones come at the end of their cells: where each is in what lies there now.
        is_new = cells.rows >= begin
        place = cells.rows.masked_scatter(~is_new, torch.arange(begin, dtype=torch.int64, device="cpu"))
        low = low[place]
        block = torch.empty_like(cells.rows)
        block[cells.rows] = torch.repeat_interleave(cells.begins.diff())
        block = block[begin:]
    largest = [x.scatter_reduce(0, block, y, "amax") for x, y in ((errors, error), (squares, norm))]
    return [mean, scale, low, *largest]


def _copy(bank: Tensor, mean: Tensor, scale: Tensor, dtype: torch.dtype, cells: Cells | None) -> list[Tensor]:
    """Low-precision rows, block by block, with the largest error and squared norm of each."""
    rows, dim = bank.shape
    pieces = _pieces(rows, cells)
    errors, squares = _zeros(len(pieces)), _zeros(len(pieces))
    low = empty((0, 0), dtype)
    if dtype != torch.float32:
        # Only rows that go into a product as they are carry its columns.
        low = empty((rows, _width(dim) if dtype == torch.bfloat16 and has_bf16_products() else dim), dtype)
        for i, part in enumerate(pieces):
            own, own_scale = _taken(bank, scale, part, cells)
            norm, error = kernels.prepare(own, mean, own_scale, low[part], _role(low, dim))
            _check_low(norm, "bank", dtype)
            errors[i], squares[i] = error.max(), norm.max()
    return [low, errors, squares]


def _role(low: Tensor, dim: int) -> str:
    return "bank" if low.shape[1] == _width(dim) else "plain"


def _check_low(norms: Tensor, name: str, dtype: torch.dtype) -> None:
    if not bool(norms.isfinite().all()):
        raise ValueError(
            f"murf_fast.nearest_distance: `{name}` has entries that {str(dtype).removeprefix('torch.')} cannot hold; "
            'use precision="bfloat16" or "float32"'
        )


def _pieces(rows: int, cells: Cells | None) -> list[slice]:
    """The blocks of a bank: so many rows, or a cell."""
    if cells is None:
        return [slice(begin, min(begin + BANK_BLOCK, rows)) for begin in range(0, rows, BANK_BLOCK)]
    begins = cells.begins.tolist()
    return [slice(begin, end) for begin, end in itertools.pairwise(begins)]


def _even(count: int) -> int:
    """So many rows that products have few shapes: a new one costs the matrix library as much as a small product."""
    step = 64 if count <= 512 else 256
    return -(-count // step) * step


def _taken(bank: Tensor, scale: Tensor, part: slice, cells: Cells | None) -> tuple[Tensor, Tensor]:
    """Rows of the bank in the order that they are searched in, and their scales."""
    which = part if cells is None else cells.rows[part]
    return bank[which], _part(scale, which)


def index_layout(rows: int, dim: int, cells: int | None = None) -> tuple[list[Any], list[Any]]:
    """(dtype, shape) that the low-precision rows of an index may have, and (shape, dtype) of the errors and norms."""
    half = (torch.bfloat16, torch.float16)
    lows = [(torch.float32, (0, 0)), (torch.bfloat16, (rows, _width(dim))), *((d, (rows, dim)) for d in half)]
    return lows, [((cells or -(-rows // BANK_BLOCK),), torch.float64)] * 2


def nearest_distance(
    query: Tensor, bank: Tensor, index: list[Tensor], k: int, metric: str, distances: Tensor, indices: Tensor
) -> None:
    """The ``k`` rows of ``bank`` (R, D) nearest to every row of ``query`` (Q, D): ``distances`` (Q, k) float32 and
    ``indices`` (Q, k) int64.
    """
    for begin in range(0, len(query), QUERIES):
        part = slice(begin, begin + QUERIES)
        search = _Search(query[part], begin, bank, index, None, k, metric)
        search.look_everywhere()
        search.finish(distances[part], indices[part])


def nearest_distance_cells(
    query: Tensor,
    bank: Tensor,
    index: list[Tensor],
    cells: Cells,
    k: int,
    metric: str,
    distances: Tensor,
    indices: Tensor,
    searched: Tensor,
) -> None:
    """As ``nearest_distance``, of an index in cells; ``searched`` is the share of pairs whose product was made."""
    if len(bank) and not 0 <= int(cells.rows.min()) <= int(cells.rows.max()) < len(bank):
        raise ValueError(f"murf_fast: cells of {len(bank)} rows number them from 0")
    step, looked = max(1, min(QUERIES, CELL_ENTRIES // len(cells.centres))), 0
    for begin in range(0, len(query), step):
        part = slice(begin, begin + step)
        search = _Search(query[part], begin, bank, index, cells, k, metric)
        looked += search.look_where_it_matters()
        search.finish(distances[part], indices[part])
    searched.fill_(min(1.0, looked / max(1, len(query) * len(bank))))  # those who were asked looked twice


class _Search:
    """Some queries, prepared, and what is known about them."""

    def __init__(
        self, query: Tensor, begin: int, bank: Tensor, index: list[Tensor], cells: Cells | None, k: int, metric: str
    ) -> None:
        self.mean, self.bank_scale, self.low, self.errors, self.squares = index
        self.query, self.bank, self.metric = query, bank, metric
        self.cells: Cells | Any = cells  # None: all rows are looked at
        scale = _empty()
        if metric == "cosine":
            scale = _norms_to_scale(_squared_norms(query, "query", begin, True))
        self.scale = scale
        self.width = _width(bank.shape[1])
        self.product_ready = self.low.shape[1] == self.width
        dtype = torch.bfloat16 if self.product_ready or not _float32_products_are_exact() else torch.float32
        self.prepared = empty((len(query), self.width), dtype)
        role = "query"
        if metric == "ip":  # the columns of squared norms meet zeros
            role = "plain"
            self.prepared.zero_()
        self.query_squares, self.query_errors = kernels.prepare(query, self.mean, scale, self.prepared, role)
        if metric == "ip" and self.mean.any():
            raise ValueError("murf_fast: an index for inner products has no mean")
        _check_rows("query", self.query_squares, begin)
        self.state = kernels.State(len(query), k, max(CANDIDATES, 4 * k))
        self.pieces = _pieces(len(bank), cells)
        rows_at_a_time, queries = min(BANK_BLOCK, len(bank)), min(QUERY_BLOCK, len(query))
        if cells is not None:
            rows_at_a_time, queries = _even(rows_at_a_time), _even(queries)
        # Zeros, as products read past the end of a row, where a number does not matter but NaN times zero would.
        self.block: Any = None if self.product_ready else empty((rows_at_a_time, self.width), dtype).zero_()
        self.product = empty((queries, rows_at_a_time), dtype)
        self.gathered: Any = None if cells is None else empty((queries, self.width), dtype).zero_()

    def look(self, part: slice, error: float, square: float, numbers: Tensor | None = None) -> None:
        """Looks at rows, at most a block of them, for all queries or for those with the ``numbers``."""
        count = part.stop - part.start
        rows, error, square = self._rows(part, error, square, count if numbers is None else _even(count))
        block = kernels.Block(
            first=part.start,
            rows=None if self.cells is None else self.cells.rows[part],
            error=error,
            # Squares below the least normal number are lost whole: so many of them are less than this.
            squared_norm=square + 2.0**-90,
            # A sum of terms of at most |q|^2 + |b|^2 together; twice a product; bfloat16 instructions round pairs.
            absolute=2 * 2 * self.width * 2.0**-24 * (1 + 2.0**-10),
            relative=BFLOAT16_ROUNDING if rows.dtype == torch.bfloat16 else 2.0**-22,
        )
        bank = self.bank, self.bank_scale
        for first in range(0, len(self.query) if numbers is None else len(numbers), QUERY_BLOCK):
            some = slice(first, first + QUERY_BLOCK)
            if numbers is None:
                out = _product(self.prepared[some], rows, self.product)
                query, state = (self.query[some], _part(self.scale, some)), self.state.part(some)
                errors, squares, own = self.query_errors[some], self.query_squares[some], None
            else:
                own = numbers[some]
                torch.index_select(self.prepared, 0, own, out=self.gathered[: len(own)])
                out = _product(self.gathered[: _even(len(own))], rows, self.product)[: len(own), :count]
                query, state = (self.query, self.scale), self.state
                errors, squares = self.query_errors, self.query_squares
            kernels.scan(out, block, query, errors, squares, own, bank, state, self.metric)

    def look_everywhere(self) -> int:
        if self.cells is not None and not self.low.numel():
            # Without a copy in their order, rows are read where they lie, not gathered.
            self.cells, self.pieces = None, _pieces(len(self.bank), None)
            self.errors, self.squares = (_zeros(len(self.pieces)) for _ in range(2))
        for part, error, square in self._blocks():
            self.look(part, error, square)
        return len(self.query) * len(self.bank)

    def look_where_it_matters(self) -> int:
        """Looks at the cells that can hold one of the k nearest; returns at how many rows, of all queries together."""
        total = len(self.query)
        if total < FEW_QUERIES:
            return self.look_everywhere()
        # Evenly spaced queries say whether it pays.
        count = min(max(total // 256, 4), ASKED, total)
        asked = torch.arange(count, dtype=torch.int64, device="cpu") * total // count
        looked, matter = self._look_near(asked)
        if float((matter.double() @ self.cells.begins.diff().double()).sum()) > PAYS * count * len(self.bank):
            self.state.forget()
            return looked + self.look_everywhere()
        self.state.forget()
        everyone = torch.arange(total, dtype=torch.int64, device="cpu")
        near, matter = self._look_near(everyone)
        return looked + near + self._look_at(matter, everyone)

    def finish(self, distances: Tensor, indices: Tensor) -> None:
        kernels.finish((self.query, self.scale), (self.bank, self.bank_scale), self.state, self.metric, distances,
                       indices)  # fmt: skip

    def _rows(self, part: slice, error: float, square: float, padded: int) -> tuple[Tensor, float, float]:
        """Rows for the product, with their largest error and squared norm. What follows them, up to ``padded`` rows,
        may be anything.
        """
        if self.product_ready:
            return self.low[part.start : part.start + padded], error, square
        rows = self.block[: part.stop - part.start]
        if self.low.numel():
            norm, own = kernels.prepare(self.low[part], None, _empty(), rows, "bank")
        else:
            taken, scale = _taken(self.bank, self.bank_scale, part, self.cells)
            norm, own = kernels.prepare(taken, self.mean, scale, rows, "bank")
        return self.block[:padded], float(error + own.max()), float(norm.max())

    def _blocks(self) -> Iterator[tuple[slice, float, float]]:
        """All rows, as many at a time as a product takes; with the limits of the blocks, or cells, they lie in."""
        pieces, i = self.pieces, 0
        for part in _pieces(len(self.bank), None):
            end = i + 1
            while end < len(pieces) and pieces[end].start < part.stop:
                end += 1
            yield part, float(self.errors[i:end].max()), float(self.squares[i:end].max())
            i = end - 1 if pieces[end - 1].stop > part.stop else end

    def _look_near(self, numbers: Tensor) -> tuple[int, Tensor]:
        """Looks at the nearest cells of the queries with the rising ``numbers``; returns at how many rows, of all of
        them together, and (n, N) which other cells can hold one of the k nearest.
        """
        squared = empty((len(numbers), len(self.cells.centres)), torch.float64)
        norms = empty((len(numbers),), torch.float64)
        step = max(1, ENTRIES // max(self.cells.centres.shape))
        parts = [slice(begin, begin + step) for begin in range(0, len(numbers), step)]
        for part in parts:
            rows = Rows(self.query, self.mean, self.scale)[numbers[part]]
            squared[part], norms[part] = squared_distances(rows, self.cells), rows.square().sum(1).sqrt()
        first = first_cells(squared, self.cells, self.state.k)
        looked = self._look_at(first, numbers)
        upper = self.state.upper()[numbers].double() * (1 + 2.0**-20)
        for part in parts:
            near = lower_bounds(squared[part], norms[part], self.cells) <= upper[part, None]
            torch.logical_and(near, ~first[part], out=first[part])
        return looked, first

    def _look_at(self, chosen: Tensor, numbers: Tensor) -> int:
        """Looks at the chosen cells of numbered queries; returns at how many rows, of all queries together."""
        cell, query = chosen.T.nonzero(as_tuple=True)
        counts, looked = torch.bincount(cell, minlength=chosen.shape[1]).tolist(), 0
        errors, squares = self.errors.tolist(), self.squares.tolist()
        for i, own in enumerate(numbers[query].split(counts)):
            if not counts[i]:
                continue
            rows = self.pieces[i]
            looked += counts[i] * (rows.stop - rows.start)
            for begin in range(rows.start, rows.stop, BANK_BLOCK):
                self.look(slice(begin, min(begin + BANK_BLOCK, rows.stop)), errors[i], squares[i], own)
        return looked


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b.T, in a reused block where torch has a way to say so."""
    if a.dtype == torch.float32 and _has_onednn_linear():
        # oneDNN uses AVX-512 on every processor that has it; torch.mm takes MKL, which on AMD was half as fast.
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return torch.mm(a, b.T, out=out.flatten()[: len(a) * len(b)].view(len(a), len(b)))


def _has_onednn_linear() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _float32_products_are_exact() -> bool:
    """Whether torch computes float32 products in float32. Where users allow less, rows are rounded to bfloat16 first,
    which any such product holds exactly, so that the bounds stay true."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        return torch.get_float32_matmul_precision() == "highest"
    return matmul.fp32_precision in ("none", "ieee")


def _statistics(bank: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """The mean row (of unit rows, for cosine) and the scales that make unit rows."""
    cosine = metric == "cosine"
    squares = _squared_norms(bank, "bank", 0, cosine)
    scale = _norms_to_scale(squares) if cosine else _empty()
    total = _zeros(bank.shape[1])
    if metric == "ip":
        return total.float(), scale
    for begin in range(0, len(bank), BANK_BLOCK):
        part = slice(begin, begin + BANK_BLOCK)
        rows = bank[part].float()
        if cosine:
            # In float64, as scales of rows near the smallest numbers are beyond float32.
            rows = rows * scale[part][:, None]
        total += rows.sum(0, dtype=torch.float64)
    return (total / len(bank)).float(), scale


def _squared_norms(x: Tensor, name: str, first: int, nonzero: bool) -> Tensor:
    """Checks the rows."""
    squares = empty((len(x),), torch.float64)
    block = empty((min(BANK_BLOCK, len(x)), x.shape[1]), torch.float32)
    for begin in range(0, len(x), BANK_BLOCK):
        part = slice(begin, begin + BANK_BLOCK)
        squares[part] = kernels.prepare(x[part], None, _empty(), block[: len(x[part])], "plain")[0]
    _check_rows(name, squares, first)
    if nonzero and bool((squares == 0).any()):
        zero = (squares == 0).nonzero().flatten()[:5] + first
        raise ValueError(
            f'murf_fast.nearest_distance: metric="cosine" needs nonzero rows, `{name}` has {zero.tolist()}'
        )
    return squares


def _check_rows(name: str, squared_norms: Tensor, first: int) -> None:
    wrong = ~(squared_norms <= LARGEST_SQUARED_NORM)
    if bool(wrong.any()):
        rows = (wrong.nonzero().flatten() + first).tolist()
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise ValueError(
            f"murf_fast.nearest_distance: `{name}` must be finite with norms up to 1e18, rows {rows[:5]}{more} are not"
        )


def _norms_to_scale(squared_norms: Tensor) -> Tensor:
    return squared_norms.rsqrt()


def _width(dim: int) -> int:
    return (dim + 6 + 7) // 8 * 8


def _part(scale: Tensor, part: slice | Tensor) -> Tensor:
    return scale[part] if scale.numel() else scale


def _empty() -> Tensor:
    return _zeros(0)


def _zeros(count: int) -> Tensor:
    return empty((count,), torch.float64).zero_()
