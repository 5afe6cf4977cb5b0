"""Coresets of all banks of a detector."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from murf_fast.ops.k_center_greedy import k_center_greedy


def coresets(
    banks: Sequence[Tensor], share: float, projection: str | None, progress: Callable[[int, int], None] | None
) -> list[Tensor]:
    """The chosen rows' numbers, a share of every bank that has some; ``progress`` is told (rows selected, rows wanted)
    of all banks together.
    """
    counts = [max(1, int(share * len(bank))) if len(bank) else 0 for bank in banks]
    found = []
    for i, (bank, count) in enumerate(zip(banks, counts, strict=True)):
        if not count:
            found.append(torch.zeros(0, dtype=torch.int64, device=bank.device))
            continue
        before = sum(counts[:i])
        told = None if progress is None else lambda done, _, before=before: progress(before + done, sum(counts))
        found.append(k_center_greedy(bank, count=count, projection=projection, progress=told))
    return found
