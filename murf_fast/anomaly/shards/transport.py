"""How a question gets to every shard and the answers come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Answer = tuple[Tensor, ...]


class Shards(Protocol):
    """All shards of one bank, as whoever asks sees them: rows are numbered from the first shard's to the last one's.

    Attributes:
        counts: Rows of every shard.
    """

    counts: list[int]

    def ask(self, question: str, *args: object) -> list[Answer]:
        """What the method ``question`` of every shard returns, in their order; a tuple of tensors, of the same shapes
        and dtypes from all."""
        ...

    def least(self, question: str, *args: object) -> Tensor:
        """The elementwise minimum of the one tensor that every shard answers."""
        ...


class Parts:
    """Shards of this process, asked one after another.

    Args:
        shards: What answers, one for every part.
        counts: Their rows.
    """

    def __init__(self, shards: Sequence[object], counts: Sequence[int]) -> None:
        self._shards, self.counts = list(shards), list(counts)

    def ask(self, question: str, *args: object) -> list[Answer]:
        return [getattr(shard, question)(*args) for shard in self._shards]

    def least(self, question: str, *args: object) -> Tensor:
        return torch.stack([answer for (answer,) in self.ask(question, *args)]).amin(0)


class Ranks:
    """One shard on every rank of ``torch.distributed``; all ranks ask the same at the same time.

    Args:
        rows: Of this rank's shard.
        group: Process group (gloo, nccl); None is the default one.
        device: Where the answers lie.
    """

    def __init__(self, rows: int, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group, self._rank = group, dist.get_rank(group)
        counts = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
        counts[self._rank] = rows
        dist.all_reduce(counts, group=group)
        self.counts: list[int] = counts.tolist()
        self.shard: object = None  # set when it knows what comes before it

    @property
    def offset(self) -> int:
        """Number of this rank's first row."""
        return sum(self.counts[: self._rank])

    def ask(self, question: str, *args: object) -> list[Answer]:
        gathered = []
        for own in getattr(self.shard, question)(*args):
            everyone = [torch.empty_like(own) for _ in self.counts]
            dist.all_gather(everyone, own.contiguous(), group=self._group)
            gathered.append(everyone)
        return list(zip(*gathered, strict=True))

    def least(self, question: str, *args: object) -> Tensor:
        (answer,) = getattr(self.shard, question)(*args)
        dist.all_reduce(answer, op=dist.ReduceOp.MIN, group=self._group)
        return answer
