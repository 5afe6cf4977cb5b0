"""The record that `.ci/versions` writes of tests with several versions of Python and torch, and its table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

RECORD = Path(__file__).resolve().parents[1] / "versions.json"


def read(record: Path = RECORD) -> list[dict]:
    """Its cells, oldest versions first."""
    return json.loads(record.read_text()) if record.exists() else []


def put(record: Path, cell: dict) -> None:
    """The record with ``cell`` in the place of an earlier one of the same Python and torch."""
    cells = [old for old in read(record) if _pair(old) != _pair(cell)]
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(sorted([*cells, cell], key=_pair), indent=1) + "\n")


def table(record: Path = RECORD) -> str:
    """One row per cell; below it what failed, and what was not there to be tested."""
    cells = read(record)
    if not cells:
        return "No run is recorded yet."
    lines = ["| Python | torch | Triton | numpy | transformers | passed | skipped | failed | commit, date |"]
    lines.append("|---|---|---|---|---|---:|---:|---:|---|")
    for cell in cells:
        versions = (cell[name] or "none" for name in ("python", "torch", "triton", "numpy", "transformers"))
        counts = (str(cell[name]) for name in ("passed", "skipped", "failed"))
        lines.append(f"| {' | '.join((*versions, *counts))} | `{cell['commit']}`, {cell['date']} |")
    remarks = [
        f"- Python {_short(cell['python'])}, torch {cell['torch']}: {said}" for cell in cells for said in _said(cell)
    ]
    return "\n".join([*lines, "", *remarks] if remarks else lines)


def _said(cell: dict) -> Iterator[str]:
    if cell["failures"]:
        yield f"failed: {', '.join(f'`{name}`' for name in cell['failures'])}."
    yield from (f"not installed: {reason}" for reason in cell["missing"])
    yield from (f"{backend} does not work: {'; '.join(reasons)}." for backend, reasons in cell["against"].items())
    for reason, count in cell["skips"].items():
        yield f"{count} skipped: {reason}."


def _short(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _pair(cell: dict) -> tuple:
    """Minor Python, torch without its build: what tells cells apart, in the order of versions."""
    numbers = [int(n) for n in re.findall(r"\d+", cell["torch"].partition("+")[0])]
    return tuple(int(n) for n in _short(cell["python"]).split(".")), tuple(numbers)
