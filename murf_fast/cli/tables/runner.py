"""Measures the cases of a table: memory and a first time of each, then times in turns; within a budget."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from murf_fast.cli import meter
from murf_fast.cli._terminal import is_out_of_memory
from murf_fast.cli.clock import Clock, summary
from murf_fast.cli.tables.case import YOURS, Case
from murf_fast.cli.tables.forecast import Forecast, too_large
from murf_fast.cli.tables.results import Results

SECONDS = 2.0  # of a part of a case, for all its rounds
SLOW = 10.0  # a call that takes so long is timed once
INTERRUPTED, OVER_BUDGET = "interrupted", "budget"


def check_budget(cases: Sequence[Case], budget: float | None, forecast: Forecast) -> None:
    """A ValueError where not even one case fits."""
    if budget is None:
        return
    cheapest = min(cases, key=forecast.seconds)
    least = _first_pass(forecast, cheapest)
    if budget < least:
        raise ValueError(
            f"--budget: {budget:g} s is too little for one case: {cheapest.name} needs about {least:.2g} s"
        )


def run(
    cases: Sequence[Case], results: Results, budget: float | None, forecast: Forecast, console: Console
) -> list[str]:
    """Fills the results' rows, and writes their file after every one. An interruption keeps what is there.

    A case of which more is expected than the budget has left is left out, and so is one whose first call took more than
    is left for its second: what is measured ends at most one call too late.

    Returns:
        The names of the cases that the budget left out.
    """
    runner = _Runner(cases, results, budget, forecast)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Left())
    with Progress(*columns, console=console, transient=True) if console.is_terminal else nullcontext() as bar:
        task = bar.add_task("", total=len(cases), until=0.0) if bar else None

        def tell(what: str, left: float) -> None:
            if bar:
                bar.update(cast("Any", task), description=what, completed=runner.done, until=time.perf_counter() + left)
            else:  # a log
                line = f"{runner.done} of {len(cases)}: {what}, {_clock(left)} left"
                console.print(line, markup=False, highlight=False, soft_wrap=True)

        try:
            runner.run(tell)
        except KeyboardInterrupt:
            results.cut = INTERRUPTED
            results.rows = [row for row in results.rows if row["parts"] or row["error"]]
            results.write()
    return runner.left_out


class _TooLong(Exception):
    """A call took more than the budget has left for another one."""


class _Left(ProgressColumn):
    """Counts down to when the table should be done."""

    def render(self, task: Task) -> Text:
        left = max(0.0, task.fields["until"] - time.perf_counter())
        return Text(f"{_clock(left)} left")


class _Runner:
    def __init__(self, cases: Sequence[Case], results: Results, budget: float | None, forecast: Forecast) -> None:
        self.cases, self.results, self.budget, self.forecast = cases, results, budget, forecast
        self.device = results.machine["kind"]
        self.clock = Clock(self.device) if self.device == "cuda" else None
        self.started, self.done = time.perf_counter(), 0
        self.left_out: list[str] = []

    def run(self, tell: Callable[[str, float], None]) -> None:
        for _, group in itertools.groupby(self.cases, key=lambda case: case.group):
            measured = [ready for case in list(group) if (ready := self._first(case, tell)) is not None]
            self._in_turns(measured, tell)
        if self.left_out:
            self.results.cut = OVER_BUDGET
        self.results.write()

    def _first(
        self, case: Case, tell: Callable[..., Any]
    ) -> tuple[Case, dict[str, Callable[..., Any]], dict[str, float]] | None:
        """Memory of every part, and the time of its second call; None where there is nothing to time in turns."""
        tell(case.name, self._left())
        if self.budget is not None and _first_pass(self.forecast, case) > self.budget - self._spent():
            self.left_out.append(case.name)
            self.done += 1
            return None
        row, found = self.results.row(case), None
        row["error"] = case.problem or too_large(case, self.device)
        if row["error"] is None:
            try:
                found = self._observed(case, row)
            except _TooLong:
                self.results.rows.remove(row)
                self.left_out.append(case.name)
            except Exception as error:
                row["error"] = self._reason(case, error)
                row["parts"].clear()
        self.done += 1
        self.results.write()
        return found

    def _observed(
        self, case: Case, row: dict[str, Any]
    ) -> tuple[Case, dict[str, Callable[..., Any]], dict[str, float]]:
        parts = case.build()
        once: dict[str, float] = {}
        taken: Any
        for name, call in parts.items():
            first = meter.seconds_of(call, self.device)  # compiles, fills caches
            if self.budget is not None and first > self.budget - self._spent():
                self.forecast.learn(case, sum(once.values()) + first)
                raise _TooLong
            taken, peak = meter.observed(lambda call=call: meter.seconds_of(call, self.device), self.device)
            once[name] = taken
            row["parts"][name] = summary([taken]) | {"peak_bytes": peak}
        self.forecast.learn(case, sum(once.values()))
        return case, parts, once

    def _in_turns(self, measured: list[tuple[Any, ...]], tell: Callable[..., Any]) -> None:
        """The medians of every part; what is slow has its one time already."""
        names = list(self.results.table.parts)
        for i, name in enumerate(names):
            some = [(case, parts[name]) for case, parts, once in measured if name in parts and once[name] <= SLOW]
            if not some:
                continue
            here = ", ".join(map(str, some[0][0].group))
            rounds = SECONDS * len(some) * (len(names) - i)
            tell(f"{here}: {self.results.table.parts[name]}, in turns", self._left() + rounds)
            calls = [call for _, call in some]
            seconds = self._seconds(len(some))
            if self.clock:
                found = [self.clock(call, seconds / len(some)) for call in calls]
            elif seconds:
                times = meter.interleaved(calls, self.device, seconds=seconds, fewest=1, settle=True)
                found = [summary(t) for t in times]
            else:
                continue
            for (case, _), times in zip(some, found, strict=True):
                part = self.results.row(case)["parts"][name]
                self.results.row(case)["parts"][name] = times | {"peak_bytes": part["peak_bytes"]}
            self.results.write()

    def _seconds(self, calls: int) -> float:
        """For the rounds of a part of a group: what the budget leaves beside the cases that are still to come."""
        wanted = SECONDS * calls
        if self.budget is None:
            return wanted
        coming = sum(_first_pass(self.forecast, case) for case in self.cases[self.done :])
        spare = self.budget - self._spent() - coming
        groups = 1 + len({case.group for case in self.cases[self.done :]})
        return max(0.0, min(wanted, spare / groups / len(self.results.table.parts)))

    def _spent(self) -> float:
        return time.perf_counter() - self.started

    def _left(self) -> float:
        """Seconds until the table is done, as far as one knows."""
        coming = self.cases[self.done :]
        parts = len(self.results.table.parts)
        whole = sum(_first_pass(self.forecast, case) + parts * SECONDS for case in coming)
        return whole if self.budget is None else max(0.0, min(whole, self.budget - self._spent()))

    def _reason(self, case: Case, error: Exception) -> str:
        """In a cell; what is neither memory nor of the user's own code is a bug, and is raised."""
        if self.clock:
            torch.cuda.synchronize()  # raises where the context is dead
            torch.cuda.empty_cache()
        if is_out_of_memory(error):
            return "out of memory"
        if case.labels["code"] != YOURS:
            raise error
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _first_pass(forecast: Forecast, case: Case) -> float:
    return 2 * forecast.seconds(case)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
