"""What a table is made of: cases with labels, and what is run of each."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from murf_fast.cli.tables import kinds

OURS, PLAIN, YOURS = "murf_fast", "PyTorch", "yours"
PARTS = "parts"  # along the axis of a figure
SCHEMA = 1  # of files of results


@dataclass(frozen=True)
class Setting:
    """What the command was given; None where a table's own default holds."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch: int = 1
    sizes: tuple[int, ...] = ()
    models: tuple[str, ...] = ()
    weights: str | None = None
    model: str | None = None
    data: Path | None = None


@dataclass(frozen=True)
class Work:
    """What a case is expected to take: floating-point operations of all its parts, and bytes at its peak."""

    operations: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Args:
        labels: Values of the table's label columns. Cases that differ in ``method`` and ``code`` alone are timed in
            turns, and those that differ in ``code`` alone are compared.
        build: Makes the data and returns the table's parts, in their order, as calls without arguments. A part may use
            what the one before it made in its last call.
        facts: Values of the table's columns of facts.
        work: What one call of every part takes, for the time that is left and for what does not fit into memory.
        problem: Why it cannot be run, for its row.
    """

    labels: dict[str, Any]
    build: Callable[[], dict[str, Callable[[], object]]]
    facts: Mapping[str, float | None] = field(default_factory=dict)
    work: Work = Work()
    problem: str | None = None

    @property
    def name(self) -> str:
        return ", ".join(str(value) for value in self.labels.values())

    @property
    def group(self) -> tuple[Any, ...]:
        return tuple(value for name, value in self.labels.items() if name not in ("method", "code"))

    @property
    def kind(self) -> tuple[Any, ...]:
        """What has the same share of the machine's speed."""
        return tuple(self.labels.get(name) for name in ("method", "code"))


@dataclass(frozen=True)
class Table:
    """A table of a paper, and how it is shown.

    Args:
        title: One line.
        labels: Columns that say which case a row is of; the last is ``code``.
        parts: What is timed, column by column, and the words for it.
        facts: Columns of numbers that are known beforehand: titles, and what a number is multiplied by to be read.
        x: The label along the axis of the figure; a number makes lines, a text bars. ``PARTS``: the parts, as bars.
        sizes, models: Defaults of ``--sizes`` and ``--models``.
        size: What a size is, for the help and for messages.
        cases: Makes the cases of a setting whose sizes and models are filled in. A ValueError says what is wrong.
        notes: Lines below the table.
        remark: One more line that depends on the rows.
        half_on_gpu: Whether bfloat16 is the default on a GPU.
        replaces: Whether a user's own model takes the place of the default models, or stands beside them.
        takes_data: Whether there is ``--data``.
        shows_memory: Whether people are shown peak memory; files have it in any case.
    """

    title: str
    labels: tuple[str, ...]
    parts: dict[str, str]
    facts: dict[str, tuple[str, float]]
    x: str
    sizes: tuple[int, ...]
    models: tuple[str, ...]
    size: str
    cases: Callable[[Setting], Sequence[Case]]
    notes: tuple[str, ...] = ()
    remark: Callable[[list[dict[str, Any]]], str | None] = lambda rows: None
    half_on_gpu: bool = False
    replaces: bool = False
    takes_data: bool = False
    shows_memory: bool = True


def names() -> list[str]:
    return sorted(info.name for info in pkgutil.iter_modules(kinds.__path__))


def table(name: str) -> Table:
    """A table by its name.

    Raises:
        ValueError: There is none; the message lists them.
    """
    if name not in names():
        raise ValueError(f"no table {name!r}; there are: {', '.join(names())}")
    return importlib.import_module(f"{kinds.__name__}.{name}").TABLE
