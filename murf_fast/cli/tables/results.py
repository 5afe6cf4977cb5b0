"""The file of results: written anew after every row, so that nothing measured is lost; every format is made from it."""

from __future__ import annotations

import datetime
import json
import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import murf_fast
from murf_fast import _extension
from murf_fast.cli.tables.case import SCHEMA, Case, Setting, Table, names, table

FORMAT = "murf_fast table"
_ROW = {"labels": dict, "facts": dict, "parts": dict}
_NUMBERS = ("median_s", "p20_s", "p80_s", "rounds", "peak_bytes")


@dataclass
class Results:
    """What was measured of a table.

    Attributes:
        name: The table's.
        machine, setting: What it was measured on, and with which options.
        planned: Number of its cases.
        cut: Why the table is shorter than that; None: it is whole.
        rows: ``labels``, ``facts`` and ``parts``, in each of which are ``median_s``, ``p20_s``, ``p80_s`` (seconds),
            ``rounds`` and ``peak_bytes``; or ``error``, why there are none.
        path: Its file; None: it is not written.
    """

    name: str
    machine: dict[str, Any]
    setting: dict[str, Any]
    planned: int
    notes: list[str] = field(default_factory=list)
    cut: str | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    path: Path | None = None

    @property
    def table(self) -> Table:
        return table(self.name)

    @property
    def parts(self) -> dict[str, str]:
        """The parts that some row has."""
        return {n: t for n, t in self.table.parts.items() if any(n in row["parts"] for row in self.rows)}

    def row(self, case: Case) -> dict[str, Any]:
        """The row of a case, added if there is none."""
        for row in self.rows:
            if row["labels"] == case.labels:
                return row
        self.rows.append({"labels": case.labels, "facts": case.facts, "parts": {}, "error": None})
        return self.rows[-1]

    def write(self) -> None:
        """The file is replaced when the new one is whole."""
        if self.path is None:
            return
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(self.text())
        new.replace(self.path)

    def text(self) -> str:
        told = {
            "format": FORMAT,
            "schema": SCHEMA,
            "table": self.name,
            "machine": self.machine,
            "setting": self.setting,
            "planned": self.planned,
            "cut": self.cut,
            "notes": self.notes,
            "rows": self.rows,
        }
        return json.dumps(told, indent=1, allow_nan=False) + "\n"

    def peers(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The rows of the same case in other code."""
        own = {n: v for n, v in row["labels"].items() if n != "code"}
        for other in self.rows:
            if other is not row and {n: v for n, v in other["labels"].items() if n != "code"} == own:
                yield other


def read(path: Path) -> Results:
    """Results from a file.

    Raises:
        OSError: It cannot be read.
        ValueError: It holds no results of this schema, or of a table that there is not; the message says which.
    """
    if not path.is_file():
        raise ValueError(f"--from: {path} is no file")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--from: {path} is no JSON: {error}") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise ValueError(f"--from: {path} holds no results of `murf-fast tables`")
    if told.get("schema") != SCHEMA:
        raise ValueError(f"--from: {path} has schema {told.get('schema')!r}, this version reads {SCHEMA}")
    if told.get("table") not in names():
        raise ValueError(f"--from: {path} is of a table {told.get('table')!r}; there are: {', '.join(names())}")
    try:
        results = Results(*(told[n] for n in ("table", "machine", "setting", "planned", "notes", "cut", "rows")))
        _check(results)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--from: {path} is damaged: {error!r}") from error
    return results


def _check(results: Results) -> None:
    """A TypeError or KeyError where an entry is missing or of another kind than it was written."""
    known = results.table
    if not all(isinstance(x, kind) for x, kind in ((results.machine, dict), (results.rows, list))):
        raise TypeError("machine or rows")
    for row in results.rows:
        for name, kind in _ROW.items():
            if not isinstance(row[name], kind):
                raise TypeError(name)
        if set(row["labels"]) != set(known.labels) or not set(row["parts"]) <= set(known.parts):
            raise TypeError("labels or parts of a row")
        numbers = [part[n] for part in row["parts"].values() for n in _NUMBERS] + list(row["facts"].values())
        if not all(n is None or (isinstance(n, (int, float)) and math.isfinite(n)) for n in numbers):
            raise TypeError("a number of a row")
        row.setdefault("error", None)


def machine(device: str) -> dict[str, Any]:
    """What a table is measured on."""
    gpu = device == "cuda"
    level = _extension.current_level() if not gpu and _extension.load_error() is None else None
    return {
        "device": torch.cuda.get_device_name() if gpu else _processor(),
        "kind": device,
        "threads": torch.get_num_threads(),
        "cpu_level": level,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "murf_fast": murf_fast.__version__,
        "date": datetime.date.today().isoformat(),
    }


def described(machine: dict[str, Any]) -> str:
    """One line."""
    if machine.get("kind") == "cuda":
        where = f"{machine.get('device')}, CUDA {machine.get('cuda')}"
    else:
        threads = machine.get("threads")
        where = f"{machine.get('device')}, {threads} {'thread' if threads == 1 else 'threads'}"
        where += f", {machine['cpu_level']}" if machine.get("cpu_level") else ""
    return f"{where}, torch {machine.get('torch')}, murf_fast {machine.get('murf_fast')}"


def settings(setting: Setting) -> dict[str, Any]:
    return {
        "device": setting.device,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "batch": setting.batch,
        "sizes": list(setting.sizes),
        "models": list(setting.models),
        "weights": setting.weights,
        "model": setting.model,
        "data": None if setting.data is None else str(setting.data),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
