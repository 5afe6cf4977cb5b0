"""Records of the benchmarks: reading them back, and what must be the same before two of them are put side by side.

A record is pytest-benchmark's JSON of a run of ``benchmarks/bench_all.py``, which its own ``pytest-benchmark compare``
reads too, or the ``results.json`` that ``benchmarks/report.py`` makes of one. The first has a field of ours::

    "murf_fast": {"schema": 1, "quick": false, "options": {"suites": [...], "cases": [...]}, "planned": [...]}

A record from before that field, and a ``results.json`` without ``"schema"``, is a full one of schema 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
# What makes a machine another one, and what runs on it.
MACHINE = ("device", "driver", "processor", "threads", "cpu_level")
SOFTWARE = ("python", "torch", "triton", "murf_fast", "commit")


@dataclass(frozen=True)
class Record:
    """What a file holds.

    Attributes:
        path: The file.
        machine: What was measured and on what (``benchmarks/machine.py``).
        ceilings: The machine's own rates during the run, per second (``measured_ceilings``); none of a quick run.
        cases: Measured cases by their names, "operation: case"; times in seconds.
        failed: Cases that were refused or raised, each with the reason.
        quick: Whether the cases are the small ones of ``--quick``.
        options: ``{"suites": [...], "cases": [...]}`` that the run was started with; None where the file does not say.
        planned: The names of all cases that the run was to measure.
    """

    path: Path
    machine: dict[str, Any]
    ceilings: dict[str, float]
    cases: dict[str, dict[str, Any]]
    failed: list[str]
    quick: bool
    options: dict[str, Any] | None
    planned: list[str]

    @property
    def missing(self) -> list[str]:
        """Planned cases that were neither measured nor refused: an interrupted run has some."""
        return [name for name in self.planned if name not in self.cases and not self._refused(name)]

    def _refused(self, name: str) -> bool:
        return any(line.startswith(f"test[{name}]:") for line in self.failed)


def read(path: Path) -> Record:
    """The record in ``path``.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no record of these benchmarks, or of another schema.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    try:
        return _of_run(path, found) if "benchmarks" in found else _of_results(path, found)
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path} is neither pytest-benchmark's JSON of a run of these benchmarks nor the results.json of a report"
        ) from None


def _of_run(path: Path, run: dict[str, Any]) -> Record:
    header = run.get("murf_fast", {})
    _same_schema(path, header)
    cases = [entry["extra_info"] for entry in run["benchmarks"] if "op" in entry["extra_info"]]
    machine = run["machine_info"]["murf_fast"]
    quick = header.get("quick", False)
    named = _named(path, cases)
    planned = header.get("planned", list(named))
    ceilings = cases[0]["ceilings"] if cases else {}
    return Record(path, machine, ceilings, named, run.get("failed", []), quick, header.get("options"), planned)


def _of_results(path: Path, results: dict[str, Any]) -> Record:
    _same_schema(path, results)
    named = _named(path, results["cases"])
    failed = results.get("failed", [])
    return Record(path, results["machine"], results["ceilings"], named, failed, False, None, list(named))


def _same_schema(path: Path, holder: dict[str, Any]) -> None:
    schema = holder.get("schema", SCHEMA)
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema!r}; this version reads {SCHEMA}")


def _named(path: Path, cases: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    named = {f"{case['op']}: {case['case']}": case for case in cases}
    if len(named) != len(cases):
        raise ValueError(f"{path} has two cases of one name")
    for name, case in named.items():
        ours = case["contenders"]["murf_fast"]
        times = [times[key] for times in (ours, *case["contenders"].values()) for key in ("median_s", "p20_s", "p80_s")]
        if not all(isinstance(seconds, (int, float)) and seconds > 0 for seconds in times):
            raise ValueError(f"{path}: the times of {name!r} are no positive seconds")
    return named


def differences(old: dict[str, Any], new: dict[str, Any], keys: Iterable[str]) -> list[str]:
    """``key: old, now new`` for each of ``keys`` in which the two differ."""
    return [f"{key}: {old.get(key)}, now {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
