"""Nearest rows of a bank on a GPU: a search by one product in few digits, and differences in float64 of the rows that
its error bound leaves over.

The search keeps one row per lane, which is not enough for some queries. The device finds out which, for all queries
before the host looks, and those alone are searched again: by a product that lists every row within the bound.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from murf_fast.kernels.nearest_candidates import Bounds, Candidates, candidates, rounded, width_of
from murf_fast.kernels.nearest_exact import (
    LARGEST_SQUARED_NORM,
    REFUSED,
    Bank,
    Listed,
    Proof,
    choose,
    score,
)
from murf_fast.kernels.nearest_search import launch_nearest
from murf_fast.kernels.nearest_within import launch_within, limits_of

__all__ = ["extended_index", "index_layout", "nearest_distance", "nearest_index"]

QUERIES = 8192
# Candidates per query that are scored exactly.
CANDIDATES = 32
# Elements of temporary float64 matrices: 64 MB.
ELEMENTS = 1 << 23
# Bytes of a chunk of rounded rows from host memory, of which two are on the device.
CHUNK = 64 << 20
# Rows that the queries of a second pass list together, 16 bytes each.
LISTED = 1 << 21
# Queries that share them, and those whose lists were too short for what they found.
AGAIN, AT_LAST = 2048, 64
# Neighbours up to which going through a list for each takes less time than sorting it.
FEW_NEIGHBOURS = 64


def nearest_index(bank: Tensor, metric: str, precision: str, device: torch.device) -> list[Tensor]:
    """[mean, scales, rounded rows, their squared norms, (largest error, largest norm)]; the rows stay with the bank."""
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
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        made = rounded(bank[part].to(device), mean, cosine, dtype)
        low[part], norms[part] = made.rows, made.squares.float()
        if cosine:
            scale[part] = made.scales
        limits = torch.maximum(limits, torch.stack([made.errors.max(), made.squares.max()]))
    if not bool(limits.isfinite().all()):
        raise ValueError(
            f"murf_fast.nearest_distance: `bank` has entries that {precision} cannot hold; "
            'use precision="bfloat16" or "float32"'
        )
    return [mean, scale, low, norms, limits]


def extended_index(bank: Tensor, index: list[Tensor], metric: str, begin: int) -> list[Tensor]:
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
    return [mean, scale, rows.pin_memory() if low.is_pinned() else rows, norms, limits]


def index_layout(rows: int, dim: int) -> tuple[list, list]:
    """(dtype, shape) that the rounded rows of an index may have, and (shape, dtype) of what follows them."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return [(d, (rows, width_of(dim))) for d in dtypes], [((rows,), torch.float32), ((2,), torch.float64)]


def nearest_distance(
    query: Tensor, bank: Tensor, index: list[Tensor], k: int, metric: str, distances: Tensor, indices: Tensor
) -> None:
    """Waits for the device once, and again where queries are searched again."""
    last = torch.empty(len(query), dtype=torch.float64, device=query.device)
    status = torch.empty(len(query), dtype=torch.int8, device=query.device)
    for begin in range(0, len(query), QUERIES):
        part = slice(begin, begin + QUERIES)
        _search(query[part], bank, index, k, metric, distances[part], indices[part], last[part], status[part])
    status = status.cpu()
    if bool((status == REFUSED.value).any()):
        for begin in range(0, len(query), QUERIES):
            norms = rounded(query[begin : begin + QUERIES], index[0], False, index[2].dtype).norms
            _check("query", norms, begin, metric == "cosine")
    again = status.nonzero().flatten()
    for queries, width in ((AGAIN, len(bank)), (AT_LAST, LISTED // AT_LAST)):
        missed = [again[:0]]
        for first in range(0, len(again), queries):
            some = again[first : first + queries]
            missed.append(_search_again(query, some, last, bank, index, k, metric, width, distances, indices))
        again = torch.cat(missed)


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
) -> None:
    """The first pass. Of every query, too: the k-th squared distance, and what is known of the answer."""
    mean, scale, low, norms, limits = index
    made = rounded(query, mean, metric == "cosine", low.dtype)
    bounds, squares = Bounds(made.errors, made.squares, limits), made.squares.float()
    wanted = min(max(CANDIDATES, 2 * k), len(bank))
    found = None
    for begin, rows in _chunks(low, query.device, len(low)):
        searched = launch_nearest(made.rows, squares, rows, norms[begin : begin + len(rows)])
        more = candidates(searched, bounds, begin, bank.shape[1], k, wanted)
        found = more if found is None else _merged(found, more)
    where, listed = _listed(bank, scale, found.places, found.counts)
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
        more = _nearest_listed(query, made.scales, *_listed(bank, scale, found, counts), k)
        both = (torch.cat(pair, 1) for pair in zip((squared, places), more, strict=True))
        squared, places = _smallest(*both, k)
    distances[own] = {"l2": squared.sqrt(), "l2sq": squared, "cosine": squared / 2}[metric].float()
    indices[own] = places
    return some[missed.cpu()] if short else some[:0]


def _nearest_listed(query: Tensor, scales: Tensor, bank: Bank, listed: Listed, k: int) -> tuple[Tensor, Tensor]:
    """Squared distances in float64 and places; infinite ones where the list has fewer than k."""
    exact = score(query, scales, bank, listed)
    if k > FEW_NEIGHBOURS:
        return _smallest(exact.masked_fill_(~_exist(listed.places, listed.counts), torch.inf), listed.places, k)
    squared, places = exact.new_empty(len(query), k), listed.places.new_empty(len(query), k)
    choose(exact, listed, "l2sq", squared, places, query.shape[1])
    return squared, places


def _merged(found: Candidates, more: Candidates) -> Candidates:
    """The candidates of two chunks of a bank in host memory, whose way here takes longer than this."""
    wanted = found.values.shape[1]
    values = [x.values.masked_fill(~_exist(x.places, x.counts), torch.inf) for x in (found, more)]
    values, order = torch.cat(values, 1).sort(dim=1)
    places = torch.cat([found.places, more.places], 1).gather(1, order[:, :wanted])
    dropped = torch.minimum(torch.minimum(found.dropped, more.dropped), values[:, wanted])
    counts = (found.counts + more.counts).clamp(max=wanted)
    return Candidates(values[:, :wanted].contiguous(), places, counts, dropped)


def _exist(places: Tensor, counts: Tensor) -> Tensor:
    n = torch.arange(places.shape[1], dtype=torch.int32, device=places.device)
    return n < counts[:, None]


def _listed(bank: Tensor, scale: Tensor, places: Tensor, counts: Tensor) -> tuple[Bank, Listed]:
    """Listed rows, and where they are on the device."""
    if bank.device == places.device:
        return Bank(bank, bank.stride(0), scale if scale.numel() else None), Listed(places, counts, places)
    return _brought(bank, scale, places, counts)


def _brought(bank: Tensor, scale: Tensor, places: Tensor, counts: Tensor) -> tuple[Bank, Listed]:
    """From host memory, each row once."""
    exist = _exist(places, counts)
    wanted, slot = places[exist].unique(return_inverse=True)
    rows = bank.index_select(0, wanted.to(bank.device)).to(places.device)
    slots = torch.zeros_like(places).masked_scatter_(exist, slot)
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


def _smallest(squared: Tensor, places: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest, equal ones by rising place."""
    by_place = places.argsort(1)
    squared, places = squared.gather(1, by_place), places.gather(1, by_place)
    squared, order = squared.sort(dim=1, stable=True)
    return squared[:, :k], places.gather(1, order[:, :k])


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
