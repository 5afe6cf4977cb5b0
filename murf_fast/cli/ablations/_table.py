"""A table of numbers, for people (rich), for spreadsheets (CSV) and for programs (JSON)."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

FORMATS = ("table", "csv", "json")


@dataclass(frozen=True)
class Table:
    """Rows of one text (or number) and as many numbers as there are columns behind the first."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    note: str

    def show(self, console: Console, form: str) -> None:
        if form == "json":
            rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
            print(json.dumps({"title": self.title, "note": self.note, "rows": rows}))
        elif form == "csv":
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(self.columns)
            writer.writerows(self.rows)
        else:
            table = RichTable(title=self.title, title_justify="left", pad_edge=False)
            for i, column in enumerate(self.columns):
                table.add_column(column, justify="right" if i else "left")
            for first, *numbers in self.rows:
                table.add_row(str(first), *("" if n is None else f"{n:.4g}" for n in numbers))
            console.print(table)
            console.print(self.note, style="dim", highlight=False)
