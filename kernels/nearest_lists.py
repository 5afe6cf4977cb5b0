"""Lists of rows that may be nearest to a query, of some length each: joined, scored, the smallest of them."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast.kernels.nearest_candidates import Candidates
from murf_fast.kernels.nearest_exact import Bank, Listed, choose, score

# Candidates per query that are scored exactly.
CANDIDATES = 32
# Neighbours up to which going through a list for each takes less time than sorting it.
FEW_NEIGHBOURS = 64


def candidates_of(k: int, rows: int) -> int:
    """How many of a bank's rows may be candidates for the ``k`` nearest."""
    return min(max(CANDIDATES, 2 * k), rows)


def nearest_listed(query: Tensor, scales: Tensor, bank: Bank, listed: Listed, k: int) -> tuple[Tensor, Tensor]:
    """Squared distances in float64 and places; infinite ones where the list has fewer than k."""
    exact = score(query, scales, bank, listed)
    if k > FEW_NEIGHBOURS:
        return smallest(exact.masked_fill_(~exist(listed.places, listed.counts), torch.inf), listed.places, k)
    squared, places = exact.new_empty(len(query), k), listed.places.new_empty(len(query), k)
    choose(exact, listed, "l2sq", squared, places, query.shape[1])
    return squared, places


def merged(found: Candidates, more: Candidates) -> Candidates:
    """The candidates of two parts of a bank."""
    wanted = found.values.shape[1]
    values = [x.values.masked_fill(~exist(x.places, x.counts), torch.inf) for x in (found, more)]
    values, order = torch.cat(values, 1).sort(dim=1)
    places = torch.cat([found.places, more.places], 1).gather(1, order[:, :wanted])
    dropped = torch.minimum(torch.minimum(found.dropped, more.dropped), values[:, wanted])
    counts = (found.counts + more.counts).clamp(max=wanted)
    return Candidates(values[:, :wanted].contiguous(), places, counts, dropped)


def exist(places: Tensor, counts: Tensor) -> Tensor:
    """(Q, width) bool: what of the lists is not behind their ends."""
    n = torch.arange(places.shape[1], dtype=torch.int32, device=places.device)
    return n < counts[:, None]


def smallest(squared: Tensor, places: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest, equal ones by rising place."""
    by_place = places.argsort(1)
    squared, places = squared.gather(1, by_place), places.gather(1, by_place)
    squared, order = squared.sort(dim=1, stable=True)
    return squared[:, :k], places.gather(1, order[:, :k])
