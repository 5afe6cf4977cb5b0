"""The columns of a table: raw numbers for machines, rounded ones with units for people."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from murf_fast.cli.tables.case import OURS
from murf_fast.cli.tables.results import Results
from murf_fast.cli.tables.runner import INTERRUPTED

NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """A title for people, a name for machines, and what a row has there: a number in SI units or a text."""

    title: str
    name: str
    value: Callable[[dict[str, Any]], float | str | None]
    shown: Callable[[float], str] = str
    is_number: bool = True


def columns(results: Results, memory: bool | None = None) -> list[Column]:
    """Labels, facts, then for every part time, its ratio to ours, and peak memory (None: as the table has it)."""
    memory = results.table.shows_memory if memory is None else memory
    found = [_label(name) for name in results.table.labels]
    found += [_fact(name, *shown) for name, shown in results.table.facts.items()]
    for name, words in results.parts.items():
        found.append(Column(f"{words}, ms", f"{name}_s", _part(name, "median_s"), _milliseconds))
        if any(ratio(results, row, name) for row in results.rows):
            found.append(
                Column("x ours", f"{name}_ratio", functools.partial(_ratio, results, name), lambda x: f"{x:.2f}")
            )
        if memory and any(_part(name, "peak_bytes")(row) is not None for row in results.rows):
            found.append(Column("peak, MiB", f"{name}_peak_bytes", _part(name, "peak_bytes"), _mebibytes))
    return found


def _ratio(results: Results, part: str, row: dict[str, Any]) -> float | None:
    return ratio(results, row, part)


def ratio(results: Results, row: dict[str, Any], part: str) -> float | None:
    """A time over that of ours in the same case; None for ours."""
    if row["labels"]["code"] == OURS or part not in row["parts"]:
        return None
    ours = next((p for p in results.peers(row) if p["labels"]["code"] == OURS and part in p["parts"]), None)
    return None if ours is None else row["parts"][part]["median_s"] / ours["parts"][part]["median_s"]


def cells(results: Results, row: dict[str, Any]) -> list[str]:
    """A row as people read it; in place of the first time, why there is none."""
    found, error = [], row["error"]
    for column in columns(results):
        value = column.value(row)
        if value is None and error and column.name.endswith("_s"):
            found.append(error)
            error = None
        else:
            found.append(NOTHING if value is None else column.shown(cast("float", value)))
    if error:  # no row of the table has a time
        found[-1] = error
    return found


def cut_short(results: Results) -> str | None:
    """That a table is not whole, and why."""
    if not results.cut:
        return None
    why = "stopped by the user" if results.cut == INTERRUPTED else "the budget did not suffice for the others"
    return f"CUT SHORT: {len(results.rows)} of {results.planned} cases, {why}."


def remarks(results: Results) -> Iterator[str]:
    """What is below the table: that it was cut short, first."""
    if results.cut:
        yield cast("str", cut_short(results))
    remark = results.table.remark(results.rows)
    if remark:
        yield remark
    how = (
        "CUDA events on cold caches; peak memory: of torch's allocator"
        if results.machine.get("kind") == "cuda"
        else "wall clock, cases of a size in turns; peak memory: resident"
    )
    yield f"time: median, {how}, of a call above what was there before it. x ours: time over that of murf_fast."
    yield from results.table.notes
    yield from results.notes


def title(results: Results) -> str:
    setting = results.setting
    return f"{results.table.title}; {setting.get('dtype')}, batch {setting.get('batch')}"


def _label(name: str) -> Column:
    return Column(name, name, lambda row: row["labels"][name], is_number=name == "size")


def _fact(name: str, title: str, factor: float) -> Column:
    return Column(title, name, lambda row: _count(row["facts"].get(name)), lambda x: _short(x * factor))


def _count(value: float | None) -> float | None:
    """Without a decimal point, which readers of integers refuse."""
    return int(value) if value is not None and value == int(value) else value


def _part(name: str, number: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda row: row["parts"].get(name, {}).get(number)


def _short(x: float) -> str:
    """Three digits."""
    return f"{x:.0f}" if x >= 100 or x == int(x) else f"{x:.3g}"


def _milliseconds(seconds: float) -> str:
    return _short(1e3 * seconds)


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.1f}" if count < 10 * 2**20 else f"{count / 2**20:.0f}"
