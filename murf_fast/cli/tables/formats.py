"""A table of results as text: for terminals, Markdown, CSV, LaTeX and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from murf_fast.cli.tables.columns import cells, columns, remarks, title
from murf_fast.cli.tables.results import Results, described

_LATEX = {"\\": r"\textbackslash{}", "–": "--", "×": r"$\times$", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
_LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


def rich(results: Results, console: Console) -> None:
    """Prints; a rule between groups of the first label."""
    table = RichTable(title=title(results), title_justify="left", pad_edge=False)
    for column in columns(results):
        table.add_column(column.title, justify="right" if column.is_number else "left")
    firsts = [row["labels"][results.table.labels[0]] for row in results.rows]
    for i, row in enumerate(results.rows):
        is_last = i + 1 == len(firsts) or firsts[i + 1] != firsts[i]
        table.add_row(*cells(results, row), end_section=is_last)
    console.print(table, markup=False)
    console.print(described(results.machine), style="dim", highlight=False, markup=False, soft_wrap=True)
    for line in remarks(results):
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


def markdown(results: Results) -> str:
    found = columns(results)
    lines = [f"**{title(results)}**", ""]
    lines.append(_pipes(column.title for column in found))
    lines.append(_pipes("---:" if column.is_number else "---" for column in found))
    lines += [_pipes(cell.replace("|", "\\|") for cell in cells(results, row)) for row in results.rows]
    lines += ["", described(results.machine), "", *remarks(results)]
    return "\n".join(lines) + "\n"


def comma_separated(results: Results) -> str:
    """Seconds, bytes and counts as they are; percentiles and rounds too, and why a row has no times."""
    found, file = columns(results, memory=True), io.StringIO()
    more = [(f"{part}_{n}", part, n) for part in results.parts for n in ("p20_s", "p80_s", "rounds")]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*(column.name for column in found), *(name for name, _, _ in more), "error", "cut"])
    for row in results.rows:
        values = [column.value(row) for column in found]
        values += [row["parts"].get(part, {}).get(number) for _, part, number in more]
        writer.writerow([*("" if v is None else v for v in values), row["error"] or "", results.cut or ""])
    return file.getvalue()


def latex(results: Results) -> str:
    """A ``table`` for the package booktabs."""
    found = columns(results)
    kinds = "".join("r" if column.is_number else "l" for column in found)
    caption = f"{title(results)}. {described(results.machine)}. {' '.join(remarks(results))}"
    lines = [r"\begin{table}", r"\centering", f"\\caption{{{_escaped(caption)}}}"]
    lines += [f"\\begin{{tabular}}{{{kinds}}}", r"\toprule"]
    lines += [" & ".join(_escaped(column.title) for column in found) + r" \\", r"\midrule"]
    before = None
    for row in results.rows:
        first = row["labels"][results.table.labels[0]]
        if before not in (None, first):
            lines.append(r"\midrule")
        lines.append(" & ".join(map(_escaped, cells(results, row))) + r" \\")
        before = first
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def _pipes(parts: Any) -> str:
    return f"| {' | '.join(parts)} |"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


TEXTS: dict[str, Callable[[Results], str]] = {
    "md": markdown,
    "csv": comma_separated,
    "latex": latex,
    "json": Results.text,
}
FORMATS = ("rich", *TEXTS)
