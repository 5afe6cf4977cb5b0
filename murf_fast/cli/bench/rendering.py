"""What ``murf-fast bench`` prints of its records, with rich."""

from __future__ import annotations

from typing import Any, cast

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from murf_fast.cli.bench.compare import LEAST, Change, best, peers
from murf_fast.cli.bench.records import MACHINE, SOFTWARE, Record, differences


def show_times(console: Console, record: Record) -> None:
    """The cases of a quick record. Their names are those of the full ones, so the title says what they are not."""
    table = _table(
        "QUICK: small cases under the names of the full ones, without compilers; for a first look, for no report",
        (("case", "left"), ("murf_fast", "right"), ("against", "left"), ("ratio", "right")),
    )
    for name, case in record.cases.items():
        ours, others = case["contenders"]["murf_fast"], peers(case)
        rival = best(case, others) if others else None
        ratio = f"{case['contenders'][rival]['median_s'] / ours['median_s']:.2f}" if rival else ""
        table.add_row(escape(name), _spread(ours), escape(rival or ""), ratio)
    console.print(table)
    for line in record.failed:
        console.print(f"failed: {escape(line)}", highlight=False)


def show_changes(console: Console, old: Record, new: Record, found: list[Change], *, other_machine: bool) -> None:
    """What became slower and faster, what the runs differ in, and what could not be compared."""
    kind = "quick, of " if new.quick else ""
    console.print(f"\n[bold]Against {escape(str(old.path))}[/] ({kind}{old.machine.get('date')})", highlight=False)
    for line in differences(old.machine, new.machine, (*MACHINE, *SOFTWARE)):
        console.print(f"  {escape(line)}", highlight=False)
    if rates := _other_rates(old.ceilings, new.ceilings):
        console.print(f"  the machine itself: {rates}: busy now or then, so look again", highlight=False)
    moved = [change for change in found if change.verdict in ("slower", "faster")]
    if moved:
        console.print(_moved(moved))
    counts = {verdict: sum(c.verdict == verdict for c in found) for verdict in ("slower", "faster", "same")}
    how = "by their ratios alone" if other_machine else "by their times and their ratios"
    console.print(
        f"{len(found)} cases compared {how}: {counts['slower']} slower, {counts['faster']} faster, "
        f"{counts['same']} within the spread or within {LEAST:.0%}",
        highlight=False,
    )
    for what, names in _left_out(old, new, found):
        if names:
            console.print(f"{what}: {escape('; '.join(names))}", highlight=False)


def _other_rates(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Rates of the machine that differ by more than a quarter: neighbours slow a kernel on all cores down most."""
    moved = [rate for rate in old if rate in new and not 0.8 < new[rate] / old[rate] < 1.25]
    return ", ".join(f"{r.partition('_')[0]} {old[r] / 1e9:.3g}, now {new[r] / 1e9:.3g} G/s" for r in moved)


def _moved(moved: list[Change]) -> Table:
    times = (("before", "right"), ("now", "right"), ("against", "left"), ("ratio before", "right"), ("now", "right"))
    table = _table(None, (("", "left"), ("case", "left"), *times))
    for change in moved:
        colour = "red" if change.verdict == "slower" else "green"
        against = " / ".join(dict.fromkeys(change.against or ()))
        ratios = [f"{ratio:.2f}" for ratio in change.ratios or ()]
        sides = [_spread(times) for times in (change.before, change.after)]
        table.add_row(f"[{colour}]{change.verdict}[/]", escape(change.name), *sides, escape(against), *ratios)
    return table


def _left_out(old: Record, new: Record, found: list[Change]) -> list[tuple[str, list[str]]]:
    asked = (new.options or {}).get("cases") or list(old.cases)
    return [
        ("no contender in common, so not judged", [c.name for c in found if c.verdict == "unjudged"]),
        ("failed now", new.failed),
        ("no longer among the cases", [name for name in asked if name not in new.planned]),
    ]


def _table(title: str | None, columns: tuple[tuple[str, str], ...]) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=cast("Any", justify))
    return table


def _spread(times: dict[str, Any]) -> str:
    """``median ms (20th to 80th percentile)``."""
    low, middle, high = (f"{times[key] * 1e3:.3g}" for key in ("p20_s", "median_s", "p80_s"))
    return f"{middle} ms ({low} to {high})"
