"""The end of a search: candidates by direct differences in float64, and the nearest of them.

Two launches. Scores of a query's candidates are shared between programs where queries are few; who chooses among them
has to see all of a query.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.nearest_candidates import LAST, ROUNDING, Bounds, Rows, bounds_of

# Norms whose squares, and differences of which, float32 holds.
LARGEST_SQUARED_NORM = tl.constexpr(1e36)
# What is known of a query: that its answer is the nearest rows, that it may not be, that it cannot have one.
PROVEN, UNPROVEN, REFUSED = (tl.constexpr(i) for i in range(3))
# Long lists are shared: by so many programs in all, each with so many rows.
PROGRAMS, SHARE = 2048, 64
# Eight candidates at a time, 256 columns of them: sixteen entries a thread in flight.
BLOCK_ROWS, BLOCK_COLUMNS = 8, 256


class Bank(NamedTuple):
    """Where the rows are that candidates are compared with, and the scales of all rows of the bank, if any."""

    rows: Tensor
    stride: int
    scales: Tensor | None


class Listed(NamedTuple):
    """Rows of a bank, so many of every query. ``counts`` may be beyond the width: then the list lacks some."""

    places: Tensor  # (Q, width) int64: rows of the bank
    counts: Tensor  # (Q,) int32
    slots: Tensor  # (Q, width) int64: where each is in ``Bank.rows``; ``places`` where that is the whole bank


class Proof(NamedTuple):
    """What says whether a row that is not listed may be as near, and where that is written."""

    dropped: Tensor  # (Q,) float32: the least squared distance of rounded rows that are not listed
    norms: Tensor  # (Q,) float64: squared norms of the queries as they came
    last: Tensor  # (Q,) float64, written: the squared distance of the k-th row
    status: Tensor  # (Q,) int8, written


@kernel
def _nearest_scored(query, query_scales, bank, places, counts, slots, exact, dim, width, BLOCK_R: tl.constexpr,
                    BLOCK_D: tl.constexpr):  # fmt: skip
    """Squared distances of listed pairs. The second axis of the grid shares a query's list."""
    q = tl.program_id(0).to(tl.int64)
    places += q * width
    slots += q * width
    exact += q * width
    count = tl.minimum(tl.load(counts + q), width)
    first = tl.program_id(1) * BLOCK_R
    while first < count:
        n = first + tl.arange(0, BLOCK_R)
        exists = n < count
        row = tl.load(slots + n, mask=exists, other=0)
        total = tl.zeros([BLOCK_R], dtype=tl.float64)
        begin = 0
        while begin < dim:
            c = begin + tl.arange(0, BLOCK_D)
            both = exists[:, None] & (c < dim)[None, :]
            b = tl.load(bank.rows + (row * bank.stride)[:, None] + c[None, :], mask=both, other=0.0)
            a = tl.load(query.data + q * query.stride + c, mask=c < dim, other=0.0)
            # By way of float32, as the interpreter knows no other way from bfloat16.
            a, b = a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64)
            if query_scales is not None:
                a *= tl.load(query_scales + q)
                b *= tl.load(bank.scales + tl.load(places + n, mask=exists, other=0), mask=exists, other=0.0)[:, None]
            difference = tl.where(both, a[None, :] - b, 0.0)
            total += tl.sum(difference * difference, axis=1)
            begin += BLOCK_D
        tl.store(exact + n, total, mask=exists)
        first += tl.num_programs(1) * BLOCK_R


@kernel
def _nearest_chosen(places, counts, exact, proof, bounds, distances, indices, dim, k, width,
                    METRIC: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The k nearest of a query's list, by distance and then by row, and whether any other row can be as near.

    Of a list of fewer than k rows the last ones are infinitely far, and row ``LAST``.
    """
    q = tl.program_id(0).to(tl.int64)
    places += q * width
    exact += q * width
    count = tl.minimum(tl.load(counts + q), width)
    smallest = tl.full([], -1.0, dtype=tl.float64)
    place = tl.full([], -1, dtype=tl.int64)
    i = 0
    while i < k:
        # The first of those behind the one before.
        nearest = tl.full([BLOCK_N], float("inf"), dtype=tl.float64)
        its_place = tl.full([BLOCK_N], LAST, dtype=tl.int64)
        first = 0
        while first < count:
            n = first + tl.arange(0, BLOCK_N)
            d = tl.load(exact + n, mask=n < count, other=float("inf"))
            p = tl.load(places + n, mask=n < count, other=LAST)
            behind = (d > smallest) | ((d == smallest) & (p > place))
            closer = behind & ((d < nearest) | ((d == nearest) & (p < its_place)))
            nearest, its_place = tl.where(closer, d, nearest), tl.where(closer, p, its_place)
            first += BLOCK_N
        smallest = tl.min(nearest, axis=0)
        place = tl.min(tl.where(nearest == smallest, its_place, LAST), axis=0)
        distance = smallest
        if METRIC == "l2":
            distance = tl.sqrt(smallest)
        if METRIC == "cosine":
            distance = smallest * 0.5
        tl.store(distances + q * k + i, distance.to(distances.dtype.element_ty))
        tl.store(indices + q * k + i, place)
        i += 1
    if proof is not None:
        tl.store(proof.last + q, smallest)
        error, absolute = bounds_of(bounds, q, True, dim)
        lower = tl.sqrt(tl.maximum(tl.load(proof.dropped + q).to(tl.float64) - absolute, 0.0)) * (1 - ROUNDING) - error
        status = tl.where(lower <= tl.sqrt(smallest), UNPROVEN, PROVEN)
        norm = tl.load(proof.norms + q)
        good = norm <= LARGEST_SQUARED_NORM  # not so of NaN
        if METRIC == "cosine":
            good = good & (norm > 0)
        tl.store(proof.status + q, tl.where(good, status, REFUSED).to(tl.int8))


def score(query: Tensor, scales: Tensor, bank: Bank, listed: Listed) -> Tensor:
    """(Q, width) float64: squared distances of the listed rows; ``scales`` (Q,) make unit rows, or are empty."""
    (queries, dim), width = query.shape, listed.places.shape[1]
    exact = torch.empty(queries, width, dtype=torch.float64, device=query.device)
    shares = min(launch.cdiv(width, SHARE), launch.cdiv(PROGRAMS, queries))
    with launch.on_device_of(query):
        _nearest_scored[(queries, shares)](
            Rows(query, query.stride(0)),
            scales if scales.numel() else None,
            bank,
            listed.places,
            listed.counts,
            listed.slots,
            exact,
            dim,
            width,
            BLOCK_R=BLOCK_ROWS,
            BLOCK_D=BLOCK_COLUMNS,
        )
    return exact


def choose(
    exact: Tensor,
    listed: Listed,
    metric: str,
    distances: Tensor,
    indices: Tensor,
    dim: int,
    proof: Proof | None = None,
    bounds: Bounds | None = None,
) -> None:
    """Writes the k nearest of the listed rows, (Q, k) both, and what ``proof`` and ``bounds`` tell."""
    (queries, width), k = exact.shape, distances.shape[1]
    with launch.on_device_of(exact):
        _nearest_chosen[(queries,)](
            listed.places,
            listed.counts,
            exact,
            proof,
            bounds,
            distances,
            indices,
            dim,
            k,
            width,
            METRIC=metric,
            BLOCK_N=min(launch.power_of_two(width), 128),
        )
