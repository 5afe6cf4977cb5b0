"""The figure of a table: latency and memory against size, ours and theirs, on logarithmic axes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from murf_fast.cli.tables.case import OURS, PARTS, PLAIN, YOURS
from murf_fast.cli.tables.columns import cut_short, title
from murf_fast.cli.tables.results import Results, described

DPI = 150
PANEL = (4.8, 3.5)  # inches
# Okabe and Ito's: told apart by everyone, and by their lightness in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = {OURS: ("-", "o"), PLAIN: ("--", "s"), YOURS: (":", "^")}
HATCHES = {OURS: "", PLAIN: "////", YOURS: "...."}
QUANTITIES = (("median_s", "time, ms", 1e3), ("peak_bytes", "peak memory, MiB", 2**-20))


@dataclass(frozen=True)
class _Series:
    """One line, or the bars of one kind: numbers by what is along the axis."""

    name: str
    code: str
    colour: str
    values: dict[str, Any]


@dataclass(frozen=True)
class _Panel:
    title: str
    words: str  # of the vertical axis
    series: list[_Series]


def draw(results: Results, path: Path) -> bool:
    """Writes a PNG; whether there was something to draw."""
    panels = [panel for panel in _panels(results) if any(s.values for s in panel.series)]
    if not panels:
        return False
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    width = max(9.6, PANEL[0] * columns)
    figure = Figure(figsize=(width, PANEL[1] * rows + 1.4), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, panel, results)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    _legend(figure, grid[: len(panels)], width)
    below = "  ".join(filter(None, (described(results.machine), cut_short(results))))
    figure.suptitle(f"{title(results)}\n", x=0.01, ha="left", fontsize=12, fontweight="bold")
    below = "\n".join(textwrap.wrap(below, int(15 * width)))
    figure.text(0.01, 0.995, f"\n{below}", ha="left", va="top", fontsize=8.5, color="#555555", linespacing=1.5)
    figure.savefig(path)
    return True


def _panels(results: Results) -> list[_Panel]:
    quantities = QUANTITIES if results.table.shows_memory else QUANTITIES[:1]
    x, parts = results.table.x, results.parts
    if x == PARTS:
        return [
            _Panel("", words, _series(results, {p: (p, number, factor) for p in parts}))
            for number, words, factor in quantities
        ]
    return [
        _Panel(shown, words, _series(results, cast("dict[str, Any]", {None: (part, number, factor)})))
        for number, words, factor in quantities
        for part, shown in parts.items()
    ]


def _series(results: Results, numbers: dict[str, Any]) -> list[_Series]:
    """By the labels that are neither along the axis nor the same everywhere, and by the code.

    ``numbers``: part, number and factor by the place on the axis; the place None is that of the row's own label.
    """
    x = results.table.x
    names = [n for n in results.table.labels if n not in (x, "code")]
    names = [n for n in names if len({row["labels"][n] for row in results.rows}) > 1]
    found: dict[tuple[str, str], _Series] = {}
    colours: dict[str, str] = {}
    for row in results.rows:
        labels = row["labels"]
        name = ", ".join(str(labels[n]) for n in names)
        colour = colours.setdefault(name, COLOURS[len(colours) % len(COLOURS)])
        one = found.setdefault((name, labels["code"]), _Series(name, labels["code"], colour, {}))
        for place, (part, number, factor) in numbers.items():
            value = row["parts"].get(part, {}).get(number)
            if value:
                one.values[labels[x] if place is None else place] = value * factor
    return list(found.values())


def _draw(axes: Axes, panel: _Panel, results: Results) -> None:
    x = results.table.x
    places = list(results.parts) if x == PARTS else list(dict.fromkeys(row["labels"][x] for row in results.rows))
    if all(isinstance(place, (int, float)) for place in places):
        _lines(axes, panel.series, cast("list[float]", places))
        axes.set_xlabel(results.table.size)
    else:
        shown = [results.parts.get(p, str(p)).replace(" + ", "\n+ ").replace(": ", ":\n") for p in places]
        _bars(axes, panel.series, places, shown)
    axes.set_title(panel.title, fontsize=11, loc="left")
    axes.set_ylabel(panel.words)
    axes.grid(which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_yscale("log")
    values = [value for one in panel.series for value in one.values.values()]
    axes.set_ylim(min(values) / 2, max(values) * 2)
    # At least three labels however short the axis is.
    subs = (1.0,) if max(values) > 100 * min(values) else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _lines(axes: Axes, series: Sequence[_Series], places: Sequence[float]) -> None:
    for one in series:
        if one.values:
            style, marker = LINES[one.code]
            points = zip(*sorted(one.values.items()), strict=True)
            axes.plot(*points, style, marker=marker, color=one.colour, label=_label(one))
    axes.set_xscale("log")
    axes.set_xticks(sorted(places), [str(place) for place in sorted(places)])
    axes.xaxis.set_minor_locator(NullLocator())


def _bars(axes: Axes, series: Sequence[_Series], places: Sequence[str], shown: Sequence[str]) -> None:
    width = 0.8 / len(series)
    for i, one in enumerate(series):
        at = {place: j + (i - (len(series) - 1) / 2) * width for j, place in enumerate(places)}
        fill: dict[str, Any] = (
            {"color": one.colour} if one.code == OURS else {"facecolor": "white", "edgecolor": one.colour}
        )
        bars = axes.bar(
            [at[place] for place in one.values],
            list(one.values.values()),
            0.92 * width,
            hatch=HATCHES[one.code],
            label=_label(one),
            **fill,
        )
        if len(series) <= 4:
            axes.bar_label(bars, fmt=lambda x: f"{x:.3g}" if x < 1000 else f"{x:.0f}", fontsize=7, padding=2)
    axes.set_xticks(range(len(places)), shown)


def _legend(figure: Figure, grid: Any, width: float) -> None:
    """Below, every name once, in as many columns as there is room for."""
    found: dict[str, Any] = {}
    for axes in grid:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    columns = max(1, min(len(found), int(11 * width / (max(map(len, found)) + 8))))
    while columns > 1 and -(-len(found) // columns) % 2:  # pairs of ours and theirs stay together
        columns -= 1
    figure.legend(found.values(), found, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def _label(one: _Series) -> str:
    return ", ".join(filter(None, (one.name, one.code)))
