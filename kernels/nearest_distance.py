"""Nearest rows of a bank on a GPU: a search by one product in few digits, and differences in float64 of the rows that
its error bound leaves over.

The search keeps one row per lane, which is not enough for some queries. The device finds out which, for all queries
before the host looks, and those alone are searched again: by a product that lists every row within the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from murf_fast.kernels.nearest_candidates import Bounds, candidates, rounded, width_of
from murf_fast.kernels.nearest_exact import (
    LARGEST_SQUARED_NORM,
    REFUSED,
    Bank,
    Listed,
    Proof,
    choose,
    score,
)
from murf_fast.kernels.nearest_in_cells import Search
from murf_fast.kernels.nearest_lists import candidates_of, exist, merged, nearest_listed, smallest
from murf_fast.kernels.nearest_search import launch_nearest
from murf_fast.kernels.nearest_within import launch_within, limits_of
from murf_fast.tables.nearest_cells import Cells

__all__ = ["extended_index", "index_layout", "nearest_distance", "nearest_distance_cells", "nearest_index"]

QUERIES = 8192
# Entries of the matrix of queries and cells: 32 MB in float64.
CELL_ENTRIES = 1 << 22
# For fewer queries, two tiles, a plain search takes no longer than it takes to choose cells.
FEW_QUERIES = 256
# Elements of temporary float64 matrices: 64 MB.
ELEMENTS = 1 << 23
# Bytes of a chunk of rounded rows from host memory, of which two are on the device.
CHUNK = 64 << 20
# Rows that the queries of a second pass list together, 16 bytes each.
LISTED = 1 << 21
# Queries that share them, and those whose lists were too short for what they found.
AGAIN, AT_LAST = 2048, 64


def nearest_index(
    bank: Tensor,
    metric: str,
    precision: str,
    device: torch.device,
    arrange: Callable[[Tensor, Tensor], Cells] | None = None,
) -> list[Tensor]:
    """[mean, scales, rounded rows, their squared norms, (largest error, largest norm)]; the rows stay with the bank.

    ``arrange`` makes cells of mean and scales; rounded rows and norms are in their order then, on the bank's device.
    """
    cosine = metric == "cosine"
    dtype = torch.bfloat16 if precision == "auto" else getattr(torch, precision)
    rows, dim = bank.shape
    step = max(1, ELEMENTS // dim)
    total = torch.zeros(dim, dtype=torch.float64, device=device)
    for begin in range(0, rows, step):
        part = bank[begin : begin + step].to(device).double()
        squares = part.square().sum(1)
        _check("bank", squares, begin, cosine)
        if cosine:
            part = part * squares.rsqrt()[:, None]
        total += part.sum(0)
    mean = (total / rows).float()
    low = torch.empty(
        rows, width_of(dim), dtype=dtype, device=bank.device, pin_memory=bank.device != device and device.type == "cuda"
    )
    scale = torch.empty(rows if cosine else 0, dtype=torch.float64, device=device)
    norms = torch.empty(rows, dtype=torch.float32, device=device)
    limits = torch.zeros(2, dtype=torch.float64, device=device)
    cells = None
    if arrange is not None:
        if cosine:  # cells are of unit rows: those that will be searched
            for begin in range(0, rows, step):
                part = slice(begin, begin + step)
                scale[part] = rounded(bank[part], mean, cosine, dtype).scales
        cells = arrange(mean, scale)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        which = part if cells is None else cells.rows[part]
        made = rounded(bank[which].to(device), mean, cosine, dtype)
        low[part], norms[part] = made.rows, made.squares.float()
        if cosine:
            scale[which] = made.scales
        limits = torch.maximum(limits, torch.stack([made.errors.max(), made.squares.max()]))
    if not bool(limits.isfinite().all()):
        raise ValueError(
            f"murf_fast.nearest_distance: `bank` has entries that {precision} cannot hold; "
            'use precision="bfloat16" or "float32"'
        )
    return [mean, scale, low, norms, limits]


def extended_index(
    bank: Tensor,
    index: list[Tensor],
    metric: str,
    begin: int,
    arrange: Callable[[Tensor, Tensor], Cells] | None = None,
) -> list[Tensor]:
    """The index of ``bank``, whose rows from ``begin`` on are not in ``index`` yet. The mean stays."""
    mean, scale, low, norms, limits = index
    step = max(1, ELEMENTS // bank.shape[1])
    parts = [(scale, low, norms)]
    for first in range(begin, len(bank), step):
        made = rounded(bank[first : first + step].to(mean.device), mean, metric == "cosine", low.dtype)
        _check("rows", made.norms, first - begin, metric == "cosine")
        limits = torch.maximum(limits, torch.stack([made.errors.max(), made.squares.max()]))
        parts.append((made.scales, made.rows.to(low.device), made.squares.float()))
    if not bool(limits.isfinite().all()):
        raise ValueError(
            f"murf_fast.nearest_distance: `rows` has entries that {str(low.dtype).removeprefix('torch.')} cannot hold; "
            'use precision="bfloat16" or "float32"'
        )
    scale, rows, norms = (torch.cat(x) for x in zip(*parts, strict=True))
    if arrange is not None:
        cells = arrange(mean, scale)
        # Old rows keep their order, new ones come at the end of their cells: where each is in what lies there now.
        place = cells.rows.masked_scatter(cells.rows < begin, torch.arange(begin, dtype=torch.int64, device=low.device))
        rows, norms = rows[place], norms[place]
    return [mean, scale, rows.pin_memory() if low.is_pinned() else rows, norms, limits]


def index_layout(rows: int, dim: int, cells: int | None = None) -> tuple[list, list]:
    """(dtype, shape) that the rounded rows of an index may have, and (shape, dtype) of what follows them; with cells
    and without."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return [(d, (rows, width_of(dim))) for d in dtypes], [((rows,), torch.float32), ((2,), torch.float64)]


def nearest_distance(
    query: Tensor, bank: Tensor, index: list[Tensor], k: int, metric: str, distances: Tensor, indices: Tensor
) -> None:
    """Waits for the device once, and again where queries are searched again."""
    last, status = _unknown(query)
    for begin in range(0, len(query), QUERIES):
        part = slice(begin, begin + QUERIES)
        _search(query[part], bank, index, k, metric, distances[part], indices[part], last[part], status[part])
    _settle(query, bank, index, k, metric, distances, indices, last, status)


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
    last, status = _unknown(query)
    pairs = torch.zeros((), dtype=torch.float64, device=query.device)
    few = len(query) < FEW_QUERIES
    step = QUERIES if few else max(1, min(QUERIES, CELL_ENTRIES // len(cells.centres)))
    for begin in range(0, len(query), step):
        part = slice(begin, begin + step)
        own = distances[part], indices[part], last[part], status[part]
        if few:
            _search(query[part], bank, index, k, metric, *own, cells.rows)
            pairs += len(query) * len(bank)
        else:
            pairs += Search(query[part], bank, index, cells, k, metric).run(*own)
    again = _settle(query, bank, index, k, metric, distances, indices, last, status, cells.rows)
    searched.copy_((pairs / max(1, len(query) * len(bank)) + again / max(1, len(query))).clamp_(max=1.0))


def _unknown(query: Tensor) -> tuple[Tensor, Tensor]:
    """Of every query, written by a first pass: the k-th squared distance, and what is known of the answer."""
    last = torch.empty(len(query), dtype=torch.float64, device=query.device)
    return last, torch.empty(len(query), dtype=torch.int8, device=query.device)


def _settle(
    query: Tensor,
    bank: Tensor,
    index: list[Tensor],
    k: int,
    metric: str,
    distances: Tensor,
    indices: Tensor,
    last: Tensor,
    status: Tensor,
    names: Tensor | None = None,
) -> int:
    """After a first pass over all queries: refuses what has no answer and searches again, in the whole bank, for those
    whose answer is not proven, so many of which it returns. ``names`` (R,): which rows the rounded ones are, if they
    are in another order."""
    status = status.cpu()
    if bool((status == REFUSED.value).any()):
        for begin in range(0, len(query), QUERIES):
            norms = rounded(query[begin : begin + QUERIES], index[0], False, index[2].dtype).norms
            _check("query", norms, begin, metric == "cosine")
    again = status.nonzero().flatten()
    unproven = len(again)
    for queries, width in ((AGAIN, len(bank)), (AT_LAST, LISTED // AT_LAST)):
        missed = [again[:0]]
        for first in range(0, len(again), queries):
            some = again[first : first + queries]
            missed.append(_search_again(query, some, last, bank, index, k, metric, width, distances, indices, names))
        again = torch.cat(missed)
    return unproven


def _search(
    query: Tensor,
    bank: Tensor,
    index: list[Tensor],
    k: int,
    metric: str,
    distances: Tensor,
    indices: Tensor,
    last: Tensor,
    status: Tensor,
    names: Tensor | None = None,
) -> None:
    """The first pass. Of every query, too: the k-th squared distance, and what is known of the answer."""
    mean, scale, low, norms, limits = index
    made = rounded(query, mean, metric == "cosine", low.dtype)
    bounds, squares = Bounds(made.errors, made.squares, limits), made.squares.float()
    wanted = candidates_of(k, len(bank))
    found = None
    for begin, rows in _chunks(low, query.device, len(low)):
        searched = launch_nearest(made.rows, squares, rows, norms[begin : begin + len(rows)])
        more = candidates(searched, bounds, begin, bank.shape[1], k, wanted)
        found = more if found is None else merged(found, more)
    where, listed = _listed(bank, scale, _named(found.places, names), found.counts)
    exact = score(query, made.scales, where, listed)
    proof = Proof(found.dropped, made.norms, last, status)
    choose(exact, listed, metric, distances, indices, bank.shape[1], proof, bounds)


def _search_again(
    query: Tensor,
    some: Tensor,
    last: Tensor,
    bank: Tensor,
    index: list[Tensor],
    k: int,
    metric: str,
    rows_at_once: int,
    distances: Tensor,
    indices: Tensor,
    names: Tensor | None = None,
) -> Tensor:
    """Scores every row that may be as near as the k-th found so far. Returns those of ``some``, numbers on the host,
    whose lists were too short; there are none if a list holds as many rows as are looked at at once."""
    mean, scale, low, norms, limits = index
    own = some.to(query.device)
    query, dim = query.index_select(0, own), bank.shape[1]
    made = rounded(query, mean, metric == "cosine", low.dtype)
    within, squares = limits_of(made, last.index_select(0, own), limits, dim), made.squares.float()
    squared = torch.full((len(some), k), torch.inf, dtype=torch.float64, device=query.device)
    places = torch.full((len(some), k), len(bank), dtype=torch.int64, device=query.device)
    missed = torch.zeros(len(some), dtype=torch.bool, device=query.device)
    short = False
    for begin, rows in _chunks(low, query.device, rows_at_once):
        width = min(len(rows), LISTED // len(some))
        found, counts = launch_within(made.rows, squares, within, rows, norms[begin : begin + len(rows)], begin, width)
        short |= width < len(rows)
        missed |= counts > width
        more = nearest_listed(query, made.scales, *_listed(bank, scale, _named(found, names), counts), k)
        both = (torch.cat(pair, 1) for pair in zip((squared, places), more, strict=True))
        squared, places = smallest(*both, k)
    distances[own] = {"l2": squared.sqrt(), "l2sq": squared, "cosine": squared / 2}[metric].float()
    indices[own] = places
    return some[missed.cpu()] if short else some[:0]


def _named(places: Tensor, names: Tensor | None) -> Tensor:
    """Rows of the bank, of places in what lies in another order; behind the counts of lists there may be anything."""
    return places if names is None else names[places.clamp(0, len(names) - 1)]


def _listed(bank: Tensor, scale: Tensor, places: Tensor, counts: Tensor) -> tuple[Bank, Listed]:
    """Listed rows, and where they are on the device."""
    if bank.device == places.device:
        return Bank(bank, bank.stride(0), scale if scale.numel() else None), Listed(places, counts, places)
    return _brought(bank, scale, places, counts)


def _brought(bank: Tensor, scale: Tensor, places: Tensor, counts: Tensor) -> tuple[Bank, Listed]:
    """From host memory, each row once."""
    exists = exist(places, counts)
    wanted, slot = places[exists].unique(return_inverse=True)
    rows = bank.index_select(0, wanted.to(bank.device)).to(places.device)
    slots = torch.zeros_like(places).masked_scatter_(exists, slot)
    return Bank(rows, rows.stride(0), scale if scale.numel() else None), Listed(places, counts, slots)


def _chunks(low: Tensor, device: torch.device, step: int) -> Iterator[tuple[int, Tensor]]:
    """Rows on the device, at most ``step`` at once, and which is the first of them.

    From host memory they come in chunks on a stream of their own, the next one while the device works on this one.
    """
    if low.device == device:
        for begin in range(0, len(low), step):
            yield begin, low[begin : begin + step]
        return
    step = max(1, min(step, len(low), CHUNK // (low.shape[1] * low.element_size())))
    buffers = torch.empty(2, step, low.shape[1], dtype=low.dtype, device=device)
    here, copies = torch.cuda.current_stream(device), torch.cuda.Stream(device)

    def copied(number: int) -> tuple[Tensor, torch.cuda.Event]:
        part = low[number * step : (number + 1) * step]
        rows = buffers[number % 2, : len(part)]
        # Who used this buffer before is done, as far as work has been handed to the device by now.
        copies.wait_stream(here)
        with torch.cuda.stream(copies):
            rows.copy_(part, non_blocking=True)
            return rows, copies.record_event()

    try:
        following = copied(0)
        for begin in range(0, len(low), step):
            rows, arrived = following
            if begin + step < len(low):
                following = copied(begin // step + 1)
            here.wait_event(arrived)
            yield begin, rows
    finally:
        # The buffers' memory goes to whoever is next on this stream.
        here.wait_stream(copies)


def _check(name: str, squares: Tensor, first: int, nonzero: bool) -> None:
    wrong = (~(squares <= LARGEST_SQUARED_NORM.value)).nonzero().flatten() + first
    if len(wrong):
        rows = wrong.tolist()
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise ValueError(
            f"murf_fast.nearest_distance: `{name}` must be finite with norms up to 1e18, rows {rows[:5]}{more} are not"
        )
    if nonzero and bool((squares == 0).any()):
        zero = ((squares == 0).nonzero().flatten()[:5] + first).tolist()
        raise ValueError(f'murf_fast.nearest_distance: metric="cosine" needs nonzero rows, `{name}` has {zero}')
