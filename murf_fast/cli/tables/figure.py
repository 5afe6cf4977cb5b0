"""The figure of a table: latency and memory against size, ours and theirs, on logarithmic axes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from murf_fast.cli.tables.case import OURS, PLAIN, YOURS
from murf_fast.cli.tables.columns import remarks, title
from murf_fast.cli.tables.results import Results, described

DPI = 150
# Okabe and Ito's: told apart by everyone, and by their lightness in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = {OURS: ("-", "o"), PLAIN: ("--", "s"), YOURS: (":", "^")}
HATCHES = {OURS: "", PLAIN: "////", YOURS: "...."}
QUANTITIES = (("median_s", "time, ms", 1e3), ("peak_bytes", "peak memory, MiB", 2**-20))


def draw(results: Results, path: Path) -> bool:
    """Writes a PNG; whether there was something to draw."""
    panels = [
        (part, quantity) for quantity in QUANTITIES for part in results.parts if _values(results, part, quantity[0])
    ]
    if not panels:
        return False
    columns = min(2, len(results.parts))
    rows = -(-len(panels) // columns)
    width = max(9.0, 4.6 * columns)
    figure = Figure(figsize=(width, 3.5 * rows + 1.3), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    xs = list(dict.fromkeys(row["labels"][results.table.x] for row in results.rows))
    is_line = all(isinstance(x, (int, float)) for x in xs)
    for axes, (part, (number, words, factor)) in zip(grid, panels, strict=False):
        (_lines if is_line else _bars)(axes, results, part, number, factor, xs)
        axes.set_title(results.parts[part], fontsize=11, loc="left")
        axes.set_ylabel(words)
        axes.grid(which="major", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    names, handles = [], []
    for axes in grid[: len(panels)]:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            if name not in names:
                names.append(name)
                handles.append(handle)
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), fontsize=9, frameon=False)
    cut = [line for line in remarks(results) if results.cut and line.startswith("CUT SHORT")]
    below = "\n".join(textwrap.wrap("  ".join([described(results.machine), *cut]), int(width * 13)))
    figure.suptitle(f"{title(results)}\n", x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.text(0.01, 0.995, f"\n{below}", ha="left", va="top", fontsize=8.5, color="#555555", linespacing=1.5)
    figure.savefig(path)
    return True


def _lines(axes: Axes, results: Results, part: str, number: str, factor: float, xs: Sequence[float]) -> None:
    for colour, (name, of_code) in _series(results).items_with_colours():
        for code, rows in of_code.items():
            points = [(row["labels"][results.table.x], _value(row, part, number)) for row in rows]
            points = sorted((x, y * factor) for x, y in points if y)
            if points:
                style, marker = LINES[code]
                axes.plot(*zip(*points, strict=True), style, marker=marker, color=colour, label=_named(name, code))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted(xs), [str(x) for x in sorted(xs)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(results.table.size)
    _decades(axes)


def _bars(axes: Axes, results: Results, part: str, number: str, factor: float, xs: Sequence[str]) -> None:
    series = [
        (colour, name, code, rows)
        for colour, (name, of_code) in _series(results).items_with_colours()
        for code, rows in of_code.items()
    ]
    width = 0.8 / max(1, len(series))
    for i, (colour, name, code, rows) in enumerate(series):
        heights = {row["labels"][results.table.x]: _value(row, part, number) for row in rows}
        at = [j + (i - (len(series) - 1) / 2) * width for j, x in enumerate(xs) if heights.get(x)]
        values = [heights[x] * factor for x in xs if heights.get(x)]
        if values:
            fill = {"color": colour} if code == OURS else {"facecolor": "white", "edgecolor": colour}
            axes.bar(at, values, 0.92 * width, hatch=HATCHES[code], label=_named(name, code), linewidth=1, **fill)
    axes.set_yscale("log")
    axes.set_xticks(range(len(xs)), ["\n".join(textwrap.wrap(str(x).replace("+", "+ "), 18)) for x in xs])
    _decades(axes)


def _decades(axes: Axes) -> None:
    """At least three labels on an axis however short it is."""
    low, high = axes.get_ylim()
    subs = (1.0,) if high > 300 * low else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.yaxis.set_minor_locator(NullLocator())


class _Series(dict):
    """Rows by the labels that are neither the axis nor the code, then by code."""

    def items_with_colours(self):
        return [(COLOURS[i % len(COLOURS)], item) for i, item in enumerate(self.items())]


def _series(results: Results) -> _Series:
    found = _Series()
    for row in results.rows:
        labels = row["labels"]
        name = ", ".join(str(v) for n, v in labels.items() if n not in (results.table.x, "code"))
        found.setdefault(name, {}).setdefault(labels["code"], []).append(row)
    return found


def _named(name: str, code: str) -> str:
    return ", ".join(part for part in (name, code) if part)


def _value(row: dict, part: str, number: str) -> float | None:
    return row["parts"].get(part, {}).get(number)


def _values(results: Results, part: str, number: str) -> list[float]:
    return [value for row in results.rows if (value := _value(row, part, number))]
