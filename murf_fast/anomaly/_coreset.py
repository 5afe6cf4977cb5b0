"""Coresets of all banks of a detector."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from murf_fast.annotations import Projection
from murf_fast.anomaly._selection import Selection
from murf_fast.ops.k_center_greedy import k_center_greedy

Select = Callable[[int, int, int], Selection]
Choose = Callable[[int, Tensor, Selection, Projection | None, Callable[[int], None]], None]


def _unkept(bank: int, rows: int, count: int) -> Selection:
    return Selection(None, {}, rows, count)


def _choose(
    number: int, bank: Tensor, own: Selection, projection: Projection | None, told: Callable[[int], None]
) -> None:
    def progress(done: int, _: int) -> None:
        own.tell()
        told(done)

    k_center_greedy(
        bank,
        count=len(own.chosen),
        start=own.start,
        projection=projection,
        progress=progress,
        out=own.chosen,
        nearest=own.nearest,
    )


def coresets(
    banks: Sequence[Tensor],
    share: float,
    projection: Projection | None,
    progress: Callable[[int, int], None] | None,
    selection: Select = _unkept,
    choose: Choose = _choose,
) -> list[Tensor]:
    """The chosen rows' numbers, a share of every bank that has some; ``progress`` is told (rows selected, rows wanted)
    of all banks together. ``selection``: of a bank's number, rows and wanted rows, how far an earlier call came; by
    default nothing is kept of one. ``choose``: of a bank's number, the bank, how far its selection came, ``projection``
    and whom to tell (rows selected), goes on with the selection to its end; by default here.

    Memory: 8 bytes per row of one bank, beside what :func:`k_center_greedy` takes.
    """
    counts = [max(1, int(share * len(bank))) if len(bank) else 0 for bank in banks]
    found, before, wanted = [], 0, sum(counts)
    for i, (bank, count) in enumerate(zip(banks, counts, strict=True)):
        if not count:
            found.append(torch.zeros(0, dtype=torch.int64, device=bank.device))
            continue
        own = selection(i, len(bank), count)
        if own.done and progress is not None:
            progress(before + own.done, wanted)
        if own.done < count:
            _select(choose, i, bank, own, projection, _counted_from(before, wanted, progress))
        found.append(own.chosen)
        before += count
    return found


def _counted_from(before: int, wanted: int, progress: Callable[[int, int], None] | None) -> Callable[[int], None]:
    def told(done: int) -> None:
        if progress is not None:
            progress(before + done, wanted)

    return told


def _select(
    choose: Choose,
    number: int,
    bank: Tensor,
    own: Selection,
    projection: Projection | None,
    told: Callable[[int], None],
) -> None:
    try:
        choose(number, bank, own, projection, told)
    except BaseException:
        own.stop()
        raise
    own.save()
