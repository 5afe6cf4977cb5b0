"""Greedy k-center over shards: the selection of :func:`murf_fast.k_center_greedy`, with few questions to the shards.

A question tells the shards which rows were selected since the last one, and every shard answers with its farthest rows
and how far the next of its rows is. Among the rows of all answers the selection goes on by itself, as distances to
further centers only fall: the farthest of them is the farthest of all rows while no shard's next one is farther. So one
question serves many steps, and every step is the exact one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from murf_fast import _arguments
from murf_fast.anomaly.shards.rows import own_rows, rows_of
from murf_fast.anomaly.shards.transport import Answer, Ranks, Shards
from murf_fast.ops._k_center_rows import NONE, KCenterRows
from murf_fast.ops._rows import check_finite, matrix
from murf_fast.ops.k_center_greedy import projected

# Rows of an answer. More of them serve more steps each, up to some: see docs/guides/cluster.md.
FARTHEST = 64
# Steps after which shards are asked, at the latest: what they have to do before they answer.
STEPS = 64


class KCenterShard:
    """Rows of a bank from ``first`` on, and how far they are from the centers.

    Args:
        rows: (m, D), floating point, on the CPU.
        first: Number of the first among all.
        nearest: As for :class:`KCenterRows`.
        projection: (P, D): distances are those of projected rows; ``first`` is a multiple of ``ROWS`` then.
    """

    def __init__(
        self, rows: Tensor, first: int, nearest: Tensor | None = None, projection: Tensor | None = None
    ) -> None:
        check_finite("k_center_greedy", f"features[{first}:]", rows)
        if projection is not None:
            rows = projected(rows, projection.to(torch.promote_types(rows.dtype, torch.float32)))
        self._rows, self._first = KCenterRows(rows, first, nearest), first

    def farthest(self, centers: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Meets centers (n, D), then :meth:`KCenterRows.farthest`. Asked twice it answers the same."""
        self._rows.meet(centers)
        return self._rows.farthest(count)

    def rows(self, numbers: Tensor) -> tuple[Tensor]:
        """(n, D): the rows of these numbers as distances are taken of them, zeros where they are others'."""
        return (own_rows(self._rows.rows, self._first, numbers),)

    def nearest(self) -> tuple[Tensor]:
        """(m,) float64: squared distances of all rows."""
        return (self._rows.nearest,)


def select(
    shards: Shards, centers: Tensor, chosen: Tensor, given: int, told: Callable[[int, Tensor], None] | None = None
) -> None:
    """Fills ``chosen`` (K,) int64 from ``given`` on.

    Args:
        shards: Of ``KCenterShard``; they have met some centers, and must still meet
        centers: (n, D), rows that are chosen, the last of them among them.
        told: Called after every question with how many rows are chosen and those (n, D) that no shard has met yet; what
            it raises ends the selection, with ``chosen`` as far as it came.

    Memory: ``FARTHEST`` rows of every shard, twice.
    """
    done = given
    while done < len(chosen):
        pool = _Pool(shards.ask("farthest", centers, FARTHEST))
        numbers, centers = pool.taken(min(STEPS, len(chosen) - done))
        chosen[done : done + len(numbers)] = numbers
        done += len(numbers)
        if told is not None:
            told(done, centers)


class _Pool:
    """The farthest rows of all shards, rising by number, and the farthest row that is not among them."""

    def __init__(self, answers: list[Answer]) -> None:
        rows, numbers, squared = zip(*answers, strict=True)
        next_numbers, next_squared = (torch.stack([x[-1] for x in xs]) for xs in (numbers, squared))
        rows, numbers, squared = torch.cat(rows), *(torch.cat([x[:-1] for x in xs]) for xs in (numbers, squared))
        there = numbers != NONE  # each answer's rise, and so do the shards'
        self._numbers, self._rows = numbers[there], KCenterRows(rows[there], nearest=squared[there])
        # The lowest number among the farthest.
        self._limit = float(next_squared.max())
        self._limit_number = int(next_numbers[next_squared == self._limit].min())

    def taken(self, most: int) -> tuple[Tensor, Tensor]:
        """Numbers and rows of the next centers: as many as follow from these rows alone, one at least."""
        places: list[int] = []
        while len(places) < most:
            place = int(self._rows.nearest.argmax())
            squared, number = float(self._rows.nearest[place]), int(self._numbers[place])
            if squared < self._limit or (squared == self._limit and number > self._limit_number):
                break
            places.append(place)
            self._rows.meet(self._rows.rows[place : place + 1])
        return self._numbers[places], self._rows.rows[places]


def sharded_k_center_greedy(
    rows: Tensor, *, count: int, start: int = 0, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The selection of :func:`murf_fast.k_center_greedy` from rows that lie on several ranks, row for row the same.

    All ranks of the group call it and get the same. It takes one question for many steps: each rank sends its ``64``
    farthest rows and how far the next is, and all go on with these as far as they decide.

    Args:
        rows: (m, D), this rank's rows, on the CPU, floating point; ranks may hold different numbers of rows, or none.
            Rows are numbered by rank: rank 0's come first.
        count: Rows to select, at most those of all ranks.
        start: Number of the first.
        group: Process group (gloo); None is the default one.

    Returns:
        (count,) numbers in int64, in the order of selection.

    Raises:
        TypeError, ValueError: An argument is wrong; rows that are not finite are named.

    Memory: a copy of this rank's rows, 1 byte per value and 32 bytes per row; 64 rows of every rank.

    Source: as :func:`murf_fast.k_center_greedy`.
    """
    what = "sharded_k_center_greedy"
    rows = matrix(what, "rows", rows)
    check_finite(what, "rows", rows)
    ranks = Ranks(len(rows), group, rows.device)
    total = sum(ranks.counts)
    count, start = _arguments.integer(what, "count", count, 1), _arguments.integer(what, "start", start, 0)
    if count > total:
        raise ValueError(f"murf_fast.{what}: `count` must be at most the {total} rows of all ranks, got {count}")
    if start >= total:
        raise ValueError(f"murf_fast.{what}: `start` must be in 0 .. {total - 1}, got {start}")
    ranks.shard = KCenterShard(rows, ranks.offset)
    chosen = torch.full((count,), start, dtype=torch.int64, device="cpu")
    select(ranks, rows_of(ranks, chosen[:1]), chosen, 1)
    return chosen
