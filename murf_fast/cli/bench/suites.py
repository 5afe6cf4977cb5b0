"""``murf-fast bench``: runs the suites of a source checkout and writes their report."""

from __future__ import annotations

import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SUITES = Path(__file__).resolve().parents[3] / "benchmarks"


def operations() -> list[str]:
    """Operations and models that have cases in the checkout's registry."""
    return runpy.run_path(str(SUITES / "registry.py"))["suites"]()


def main(ops: Sequence[str] = (), out: Path | None = None) -> int:
    """Run the suites of ``ops`` (all if empty) and write tables and plots; returns the exit status of pytest.

    Args:
        ops: Names of operations, as in :func:`operations`.
        out: Folder for the results; None updates ``benchmarks/results`` and the project's README, which only a run of
            all suites may do.
    """
    if not SUITES.is_dir():
        raise FileNotFoundError("the benchmarks are part of the source checkout, and this is an installed package")
    unknown = sorted(set(ops) - set(operations()))
    if unknown:
        raise ValueError(f"no suite for {', '.join(unknown)}; there are: {', '.join(operations())}")
    if out is None and ops:
        out = Path("out/benchmarks")
    chosen = [option for op in ops for option in ("--suite", op)]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run.json")
        options = ["-q", "-p", "no:cacheprovider", "--benchmark-disable-gc", f"--benchmark-json={run}"]
        command = [sys.executable, "-m", "pytest", str(SUITES / "bench_all.py"), "--benchmark-columns=median,rounds"]
        status = subprocess.run([*command, *options, *chosen], cwd=SUITES.parent).returncode
        if not run.is_file() or not run.stat().st_size:
            return status or 1
        report = [sys.executable, str(SUITES / "report.py"), str(run)]
        report += ["--readme", str(SUITES.parent / "README.md")] if out is None else ["--out", str(out)]
        return subprocess.run(report).returncode or status
