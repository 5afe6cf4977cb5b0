"""``murf-fast bench``: runs the suites of a source checkout, keeps their record, writes their report, compares."""

from __future__ import annotations

import importlib.util
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from murf_fast.cli.bench import compare, records
from murf_fast.cli.bench.records import Record
from murf_fast.cli.bench.rendering import show_changes, show_times

SUITES = Path(__file__).resolve().parents[3] / "benchmarks"
DEFAULT = Path("out/benchmarks")
TABLES = {"anyup": "anyup10", "featsharp": "featsharp14", "jbu": "jbu"}  # of `murf-fast tables`, without a checkout
NEEDED = ("pytest", "pytest_benchmark", "psutil", "matplotlib")
REFUSED, SLOWER, INTERRUPTED = 1, 10, 130
PYTEST_INTERRUPTED = 2


@dataclass(frozen=True)
class Options:
    """What ``murf-fast bench`` was asked for; see its help."""

    suites: Sequence[str] = ()
    out: Path | None = None
    against: Path | None = None
    fail_on_slower: bool = False
    other_machine: bool = False
    quick: bool = False
    resume: bool = False

    @property
    def record(self) -> Path:
        """Where the run is kept. Small cases have a file of their own."""
        return (self.out or DEFAULT) / ("quick.json" if self.quick else "run.json")

    @property
    def for_the_project(self) -> bool:
        """Whether ``benchmarks/results`` is to be updated, as only a full run of everything may."""
        return self.out is None and not self.suites and self.against is None and not self.quick


def operations() -> list[str]:
    """Operations and models that have cases in the checkout's registry."""
    return runpy.run_path(str(SUITES / "registry.py"))["suites"]()


def main(options: Options, console: Any) -> int:
    """Measures, reports, compares; all that can be refused is refused before.

    Returns:
        0; :data:`REFUSED` if a case gave a wrong result or raised; :data:`SLOWER` if ``fail_on_slower`` and something
        did become slower; :data:`INTERRUPTED`.

    Raises:
        OSError, ValueError: Bad input, in one line.
        ModuleNotFoundError: A library of the extra ``[bench]`` is missing.
    """
    if not (SUITES / "registry.py").is_file():
        raise FileNotFoundError("the benchmarks are part of the source checkout, and this is an installed package")
    _check_names(options.suites)
    if options.against is None and (options.fail_on_slower or options.other_machine):
        raise ValueError("--fail-on-slower and --other-machine say how to compare, and need --against")
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(name, name=name)
    machine = runpy.run_path(str(SUITES / "machine.py"))["describe"]()
    old = None if options.against is None else _baseline(options, machine)
    cases = [] if old is None else _wanted(old, options.suites)
    asked = {"suites": list(options.suites), "cases": cases}
    if options.resume:
        is_due = _is_due(_resumable(options, asked, machine), console)
    else:
        is_due = True
        options.record.parent.mkdir(parents=True, exist_ok=True)
        _keep_earlier(options.record, console)
    status = _measure(options, asked, console) if is_due else 0
    if not options.record.is_file():
        console.print("nothing was measured")
        return status or REFUSED
    new = records.read(options.record)
    if new.missing:
        done = len(new.planned) - len(new.missing)
        console.print(
            f"{'interrupted' if status == INTERRUPTED else 'ended early'}: {done} of {len(new.planned)} cases are kept "
            f"in {options.record}; the same command with --resume measures the others",
            highlight=False,
            soft_wrap=True,
        )
        return status or REFUSED
    status = _report(options, new, console) or status or (REFUSED if new.failed else 0)
    if old is None:
        return status
    found = compare.changes(old, new, other_machine=options.other_machine)
    show_changes(console, old, new, found, other_machine=options.other_machine)
    slower = any(change.verdict == "slower" for change in found)
    return status or (SLOWER if slower and options.fail_on_slower else 0)


def _check_names(names: Sequence[str]) -> None:
    unknown = sorted(set(names) - set(operations()))
    if unknown:
        raise ValueError(
            f"no suite for {', '.join(unknown)}; there are: {', '.join(operations())}; "
            f"and, each by itself: {', '.join(TABLES)}"
        )


def _baseline(options: Options, machine: dict[str, Any]) -> Record:
    """The record to compare with, if it can be."""
    old = records.read(cast("Path", options.against))
    if not old.cases:
        raise ValueError(f"{old.path} holds no case")
    if old.quick != options.quick:
        kinds = ("full", "small (--quick)")
        raise ValueError(f"{old.path} is of {kinds[old.quick]} cases, and this run is of {kinds[options.quick]} ones")
    if old.machine.get("driver"):
        raise ValueError(f"{old.path} is of a GPU, and this command measures the CPU")
    other = records.differences(old.machine, machine, records.MACHINE)
    if other and not options.other_machine:
        raise ValueError(
            f"{old.path} is of another machine ({'; '.join(other)}); --other-machine compares the ratios all the same"
        )
    return old


def _wanted(old: Record, suites: Sequence[str]) -> list[str]:
    """The cases of ``old`` that are to be measured again: those of ``suites``, or all that there are still."""
    chosen = suites or operations()
    found = [name for name, case in old.cases.items() if case["op"] in chosen]
    if not found:
        raise ValueError(f"{old.path} has no case of {', '.join(chosen)}")
    return found


def _resumable(options: Options, asked: dict[str, Any], machine: dict[str, Any]) -> Record:
    """The record that is to be continued, if it is one of this command, machine and commit."""
    if not options.record.is_file():
        raise FileNotFoundError(f"nothing to resume: there is no {options.record}")
    record = records.read(options.record)
    differs = records.differences(record.machine, machine, (*records.MACHINE, *records.SOFTWARE))
    of = record.options or {}
    differs += [f"the {what} asked for" for what in asked if sorted(of.get(what) or []) != sorted(asked[what])]
    if differs:
        raise ValueError(f"{options.record} cannot be resumed, for what differs: {'; '.join(differs)}")
    return record


def _is_due(record: Record, console: Any) -> bool:
    """Whether a resumed run has anything to do. What was refused is measured again: it may have been mended."""
    left = [name for name in record.planned if name not in record.cases]
    console.print(f"{len(record.cases)} cases are kept, {len(left)} left to measure", highlight=False)
    return bool(left)


def _keep_earlier(record: Path, console: Any) -> None:
    """An earlier record goes aside, under the time of its last case."""
    if record.is_file():
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(record.stat().st_mtime))
        kept = record.with_name(f"{record.stem}-{stamp}.json")
        record.replace(kept)
        console.print(f"the record that was here is now {kept}", highlight=False, soft_wrap=True)


def _measure(options: Options, asked: dict[str, Any], console: Any) -> int:
    """Runs the suites in a process of their own, which writes the record case by case."""
    command = [sys.executable, "-m", "pytest", str(SUITES / "bench_all.py"), "--benchmark-columns=median,rounds"]
    command += ["-q", "-p", "no:cacheprovider", "--benchmark-disable-gc", f"--record={options.record.resolve()}"]
    command += ["--benchmark-quiet"] if options.quick else []  # its table would come a second time
    command += [flag for flag, given in (("--quick", options.quick), ("--resume", options.resume)) if given]
    command += [f"--suite={name}" for name in asked["suites"]] + [f"--case={name}" for name in asked["cases"]]
    # What another run of pytest left there, or options for all of them, can turn benchmarks off.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    with _started(command, environment) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            _stopped(process, console)
            return INTERRUPTED
    return {0: 0, PYTEST_INTERRUPTED: INTERRUPTED}.get(status, REFUSED)


def _started(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """With SIGINT blocked until benchmarks/interruption.py takes it: imports would end in a traceback."""
    if not hasattr(signal, "pthread_sigmask"):
        return subprocess.Popen(command, cwd=SUITES.parent, env=environment)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(command, cwd=SUITES.parent, env=environment)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stopped(process: subprocess.Popen[bytes], console: Any) -> None:
    """Waits for the end of an interrupted process. A terminal's Ctrl-C reached it, too, which does no harm twice."""
    try:
        console.print("stopping after the call that runs; Ctrl-C again stops at once", highlight=False)
        if hasattr(signal, "pthread_sigmask"):
            process.send_signal(signal.SIGINT)
        process.wait()
    except KeyboardInterrupt:
        process.kill()


def _report(options: Options, record: Record, console: Any) -> int:
    """Tables and plots of a full record; the times alone of a quick one."""
    if options.quick:
        show_times(console, record)
        return 0
    command = [sys.executable, str(SUITES / "report.py"), str(options.record)]
    command += [] if options.for_the_project else ["--out", str(options.out or DEFAULT)]
    return REFUSED if subprocess.run(command).returncode else 0
