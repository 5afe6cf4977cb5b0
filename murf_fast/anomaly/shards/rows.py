"""Which rows of a bank are whose: consecutive ones, numbered from the first shard's to the last one's."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from murf_fast.anomaly import _files
from murf_fast.anomaly.shards.transport import Shards


def bounds(rows: int, shards: int, block: int = 1) -> list[int]:
    """Where shards of about equal size begin and, last, where they end: at multiples of ``block``.

    There are so many shards, or as many as there are blocks: none is empty.
    """
    blocks = -(-rows // block)
    shards = min(shards, blocks)
    return [min(rows, block * (blocks * i // shards)) for i in range(shards + 1)]


def own_rows(bank: Tensor, first: int, numbers: Tensor) -> Tensor:
    """(n, D): those of ``bank``, whose first row has the number ``first``; zeros where they are others'."""
    numbers = numbers.to(bank.device) - first
    own = (numbers >= 0) & (numbers < len(bank))
    found = torch.zeros(len(numbers), bank.shape[1], dtype=bank.dtype, device=bank.device)
    found[own] = bank[numbers[own]]
    return found


def rows_of(shards: Shards, numbers: Tensor) -> Tensor:
    """(n, D): rows of a bank by their numbers, from the shards that have them; the question is ``rows``."""
    answers = torch.stack([answer for (answer,) in shards.ask("rows", numbers)])
    ends = torch.tensor(list(itertools.accumulate(shards.counts)), dtype=torch.int64, device=answers.device)
    owners = torch.bucketize(numbers.to(answers.device), ends, right=True)
    return answers[owners, torch.arange(len(owners), dtype=torch.int64, device=answers.device)]


@dataclass(frozen=True)
class Range:
    """Rows ``begin`` to ``end`` of a bank in a file that every shard can open.

    Attributes:
        folder, name: Of the file, a bank of a detector, or of a fit that is not finished.
        rows: Of the whole bank.
    """

    folder: Path
    name: str
    rows: int
    begin: int
    end: int

    def mapped(self) -> Tensor:
        """Raises a ValueError that names the file where it is not there, damaged, or another."""
        bank, _ = _files.read_rows(self.folder, self.name, None)
        if len(bank) != self.rows:
            raise ValueError(
                f"{_files.WHAT}: bank {self.folder / self.name} has {len(bank)} rows for a worker, expected {self.rows}"
            )
        return bank[self.begin : self.end]
