"""The record of a run, written anew after every case: what is interrupted loses the case that runs, and no other.

The file is pytest-benchmark's JSON, made by its own hooks, at every moment; ``murf_fast/cli/bench/records.py`` says
what is added to it and reads it back.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from murf_fast.cli.bench.records import SCHEMA

RECORD = pytest.StashKey["Record"]()


class Record:
    """Of one session: ``kept`` is what an interrupted one measured, by case; ``planned`` names all cases of both."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.path = Path(config.getoption("record"))
        self.planned: list[str] = []
        self.kept: dict[str, dict] = {}
        self._origin: dict | None = None
        if config.getoption("resume"):
            entries = json.loads(self.path.read_text())["benchmarks"]
            self.kept = {f"{e['extra_info']['op']}: {e['extra_info']['case']}": e for e in entries}

    def write(self) -> None:
        """Puts what has been measured so far in the place of the file, in whole or not at all."""
        hook, session = self.config.hook, self.config._benchmarksession
        if self._origin is None:  # takes a second, and a commit made during a run is not what runs
            commit = hook.pytest_benchmark_generate_commit_info(config=self.config)
            hook.pytest_benchmark_update_commit_info(config=self.config, commit_info=commit)
            self._origin = {"machine_info": session.get_machine_info(), "commit_info": commit}
        measured = [entry for entry in session.benchmarks if "op" in entry.extra_info]
        found = hook.pytest_benchmark_generate_json(
            config=self.config, benchmarks=measured, include_data=False, **self._origin
        )
        hook.pytest_benchmark_update_json(config=self.config, benchmarks=measured, output_json=found)
        beside = self.path.with_name(f"{self.path.name}.part")
        beside.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(beside, self.path)

    def header(self) -> dict:
        """What the record says of itself."""
        option = self.config.getoption
        return {
            "schema": SCHEMA,
            "quick": option("quick"),
            "options": {"suites": option("suite") or [], "cases": option("case") or []},
            "planned": self.planned,
        }
