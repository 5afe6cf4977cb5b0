"""Nearest rows of a bank on a GPU: a search by one product in few digits, and differences in float64 of the rows that
its error bound leaves over. Where these are too many, which is found out for every query, all rows of the bank are held
against the bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast.kernels.nearest_candidates import (
    ROUNDING,
    Bank,
    Bounds,
    Candidates,
    Rounded,
    candidates,
    exact_nearest,
    product_error,
    rounded,
    width_of,
)
from murf_fast.kernels.nearest_search import launch_nearest

__all__ = ["extended_index", "index_layout", "nearest_distance", "nearest_index"]

QUERIES = 8192
# Candidates per query that are scored exactly.
CANDIDATES = 32
# Elements of temporary float64 matrices: 64 MB.
ELEMENTS = 1 << 23
LARGEST_SQUARED_NORM = 1e36


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
    """Waits for the device: a query whose answer is not proven by the first pass takes a second one."""
    for begin in range(0, len(query), QUERIES):
        part = slice(begin, begin + QUERIES)
        _search(query[part], begin, bank, index, k, metric, distances[part], indices[part])


def _search(
    query: Tensor,
    first: int,
    bank: Tensor,
    index: list[Tensor],
    k: int,
    metric: str,
    distances: Tensor,
    indices: Tensor,
) -> None:
    mean, scale, low, norms, limits = index
    cosine = metric == "cosine"
    made = rounded(query, mean, cosine, low.dtype)
    _check("query", made.norms, first, cosine)
    wanted = min(max(CANDIDATES, 2 * k), len(bank))
    bounds, squares = Bounds(made.errors, made.squares, limits), made.squares.float()
    found = None
    for begin, rows in _chunks(low, query.device):
        searched = launch_nearest(made.rows, squares, rows, norms[begin : begin + len(rows)])
        more = candidates(searched, bounds, begin, bank.shape[1], k, wanted)
        found = more if found is None else _merged(found, more)
    rows, slots = (bank, found.places) if bank.device == query.device else _brought(bank, found, query.device)
    where = Bank(rows, rows.stride(0), scale if cosine else None)
    last, unproven = exact_nearest(query, made, where, found, slots, limits, metric, distances, indices)
    again = unproven.nonzero().flatten()
    for begin in range(0, len(again), 256):
        some = again[begin : begin + 256]
        squared, indices[some] = _search_again(query[some], _some(made, some), last[some].sqrt(), bank, index, k)
        distances[some] = {"l2": squared.sqrt(), "l2sq": squared, "cosine": squared / 2}[metric].float()


def _merged(found: Candidates, more: Candidates) -> Candidates:
    """The candidates of two chunks of a bank in host memory, whose way here takes longer than this."""
    wanted = found.values.shape[1]
    values = [x.values.masked_fill(~_exist(x), torch.inf) for x in (found, more)]
    values, order = torch.cat(values, 1).sort(dim=1)
    places = torch.cat([found.places, more.places], 1).gather(1, order[:, :wanted])
    dropped = torch.minimum(torch.minimum(found.dropped, more.dropped), values[:, wanted])
    counts = (found.counts + more.counts).clamp(max=wanted)
    return Candidates(values[:, :wanted].contiguous(), places, counts, dropped)


def _exist(found: Candidates) -> Tensor:
    n = torch.arange(found.values.shape[1], dtype=torch.int32, device=found.values.device)
    return n < found.counts[:, None]


def _brought(bank: Tensor, found: Candidates, device: torch.device) -> tuple[Tensor, Tensor]:
    """The candidates' rows from host memory, and which of them is which candidate."""
    exist = _exist(found)
    rows = bank.index_select(0, found.places[exist].to(bank.device)).to(device)
    return rows, (exist.flatten().cumsum(0) - 1).view(exist.shape)


def _some(made: Rounded, some: Tensor) -> Rounded:
    return Rounded(*(x[some] if x.numel() else x for x in made))


def _chunks(low: Tensor, device: torch.device):
    """Rows on the device: all of them, or one chunk after the other from host memory."""
    if low.device == device:
        yield 0, low
        return
    step = max(1, (256 << 20) // (low.shape[1] * low.element_size()))
    for begin in range(0, len(low), step):
        yield begin, low[begin : begin + step].to(device, non_blocking=True)


def _exact(query: Tensor, query_scale: Tensor, bank: Tensor, scale: Tensor, places: Tensor) -> Tensor:
    """Squared distances by direct differences in float64, of pairs."""
    rows = bank.index_select(0, places.to(bank.device)).to(query.device).double()
    query = query.double()
    if scale.numel():
        rows, query = rows * scale[places][:, None], query * query_scale[:, None]
    return (query - rows).square().sum(1)


def _smallest(squared: Tensor, places: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest, equal ones by rising place."""
    by_place = places.argsort(1)
    squared, places = squared.gather(1, by_place), places.gather(1, by_place)
    squared, order = squared.sort(dim=1, stable=True)
    return squared[:, :k], places.gather(1, order[:, :k])


def _search_again(query: Tensor, made: Rounded, bound: Tensor, bank: Tensor, index: list[Tensor], k: int):
    """Scores every row that may be as near as ``bound``, the distance of the k-th row found so far."""
    _, scale, low, norms, limits = index
    found = torch.full((len(query), k), torch.inf, dtype=torch.float64, device=query.device)
    places = torch.full((len(query), k), len(low), dtype=torch.int64, device=query.device)
    # As in the kernels: nearest_candidates.py says what these are.
    errors = made.errors + limits[0]
    absolute = product_error(made.squares + limits[1], bank.shape[1])
    step = max(1, ELEMENTS // max(len(query), query.shape[1]))
    for begin in range(0, len(low), step):
        rows = low[begin : begin + step].to(query.device).double()
        d = made.squares[:, None] + norms[begin : begin + step].double() - 2 * made.rows.double() @ rows.T
        lower = (d - absolute[:, None]).clamp(min=0).sqrt() * (1 - ROUNDING.value) - errors[:, None]
        exact = torch.full_like(d, torch.inf)
        i, j = (lower <= bound[:, None]).nonzero(as_tuple=True)
        for pairs in torch.arange(len(i), dtype=torch.int64, device=i.device).split(4096):
            some = made.scales[i[pairs]] if len(scale) else made.scales
            exact[i[pairs], j[pairs]] = _exact(query[i[pairs]], some, bank, scale, j[pairs] + begin)
        everything = torch.arange(begin, begin + len(rows), dtype=torch.int64, device=query.device)
        everything = everything.expand(len(query), -1)
        found, places = _smallest(torch.cat([found, exact], 1), torch.cat([places, everything], 1), k)
    return found, places


def _check(name: str, squares: Tensor, first: int, nonzero: bool) -> None:
    wrong = (~(squares <= LARGEST_SQUARED_NORM)).nonzero().flatten() + first
    if len(wrong):
        rows = wrong.tolist()
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise ValueError(
            f"murf_fast.nearest_distance: `{name}` must be finite with norms up to 1e18, rows {rows[:5]}{more} are not"
        )
    if nonzero and bool((squares == 0).any()):
        zero = ((squares == 0).nonzero().flatten()[:5] + first).tolist()
        raise ValueError(f'murf_fast.nearest_distance: metric="cosine" needs nonzero rows, `{name}` has {zero}')
