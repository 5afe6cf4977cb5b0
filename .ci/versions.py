"""Quick tests with several versions of Python and torch, each pair in a virtual environment of its own.

    .ci/versions                                   # every pair of CELLS whose Python is here
    .ci/versions --python 3.10 --torch 2.6.0       # one pair; --python takes a path, too

A cell installs that torch, the library with its extension from this tree, what the tests need, and runs QUICK on what
was installed. Cells run one after the other and their environments, of up to 8 GB, are removed; with --keep they stay,
and the next run of such a cell only installs the library anew. What came out replaces the cell in docs/versions.json,
from which the documentation makes its table. The status is 1 if a test failed, or a cell that was named cannot be had;
a Python of CELLS that is not here is said and passed over.

A Python is looked for among pyenv's and on PATH. Packages come from wherever pip is set up to find them. Kernels are
compiled once for all Pythons (MURF_FAST_OBJECTS). Only the standard library is needed.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))
import tested_versions  # noqa: E402

# Oldest with oldest, newest with newest, between them a diagonal: 2.10 is the first whose Triton is new enough, 2.11
# what our GPUs were measured with, 2.13 the torch of the Makefile.
CELLS = (
    ("3.10", "2.6.0"),
    ("3.11", "2.13.0"),
    ("3.12", "2.8.0"),
    ("3.12", "2.11.0"),
    ("3.13", "2.10.0"),
    ("3.13", "2.14.1"),
    ("3.14", "2.14.1"),
    ("3.14", "2.15.0"),
)
EXTRAS = ("cli", "models", "anomaly")
# The interpreter of Triton's kernels is Triton's own: a torch for CUDA has brought one, a build for the CPU none.
NEEDS = ("pytest", "hypothesis", "psutil", "pyyaml", "triton; platform_system == 'Linux'")
# What leans on torch's less settled parts, and one use of everything else; two minutes of one core.
QUICK = (
    "test_imports.py",
    "test_reprs.py",
    "test_cli.py::test_info_as_a_module",
    "test_cli.py::test_demo_end_to_end",
    "test_gpu_quick.py",  # every op with gradients in Triton's interpreter
    "test_plain_calls.py",
    "test_registered_ops.py",
    "test_every_op.py::test_one_graph_for_sizes_that_vary",
    "test_every_op.py::test_who_saved_a_tensor_notices_that_it_was_written",
    "test_resize.py::test_registration",
    "test_upsample_argmax.py::test_registration",
    "test_upsample_cross_entropy.py::test_registration",
    "test_window_attention.py::test_registration",
    "test_linear_head.py::test_compile_with_inductor",
    "test_export.py",
    "test_export_models.py",
    "test_flops.py",
    "test_murf.py",
    "test_anyup.py::test_parity",
    "test_anyup.py::test_compile",
)
BUILD = {"MURF_FAST_OBJECTS": str(ROOT / "build" / "objects"), "MURF_FAST_REQUIRE_NATIVE": "1"}
QUIET = ("--disable-pip-version-check", "--no-cache-dir", "--quiet")


class NotToBeHadError(RuntimeError):
    """A Python or a torch that is not here."""


def python_of(wanted: str) -> str:
    """The interpreter of a version, or of a path."""
    if os.sep in wanted:
        places = [wanted]
    else:
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
        places = sorted(str(path) for path in pyenv.glob(f"{wanted}*/bin/python"))
        places += [path for path in (shutil.which(f"python{wanted}"),) if path]
    for place in reversed(places):
        try:
            found = subprocess.run([place, "-c", "import sys; print(sys.version)"], capture_output=True, text=True)
        except OSError:
            continue
        if found.returncode == 0 and (os.sep in wanted or re.match(rf"{re.escape(wanted)}\b", found.stdout)):
            return place
    raise NotToBeHadError(f"no Python {wanted} is here")


class Cell:
    """One environment, in ``folder``."""

    def __init__(self, python: str, torch: str, folder: Path) -> None:
        self.python, self.torch, self.folder = python, torch, folder
        self.bin, self.constraints = folder / "venv" / "bin", folder / "constraints.txt"

    def run(self) -> dict:
        """The cell's entry of the record."""
        if not self.constraints.exists():  # written last: torch is there
            self._install_torch()
        self._pip("library", str(ROOT), *NEEDS, environment=BUILD)
        missing = [reason for extra in EXTRAS if (reason := self._lacks(extra))]
        return {**described(self._facts()), "missing": missing, **self._tests()}

    def _facts(self) -> dict:
        environment = {**os.environ, "TRITON_INTERPRET": "1"}  # as the tests run Triton
        command = [str(self.bin / "murf-fast"), "info", "--json"]
        return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)

    def _install_torch(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._call("environment", python_of(self.python), "-m", "venv", str(self.folder / "venv"))
        try:
            self._pip("torch", f"torch=={self.torch}")
        except subprocess.CalledProcessError as error:
            raise NotToBeHadError(f"pip finds no torch {self.torch} for this Python: {self._said('torch')}") from error
        self.constraints.write_text(f"torch=={self.torch}\n")

    def _lacks(self, extra: str) -> str:
        try:
            self._pip(extra, f"murf-fast[{extra}]")
        except subprocess.CalledProcessError:
            return f"extra {extra}: {self._said(extra)}"
        return ""

    def _pip(self, step: str, *packages: str, environment: dict | None = None) -> None:
        options = ["-c", str(self.constraints)] if self.constraints.exists() else []
        python = str(self.bin / "python")
        self._call(step, python, "-m", "pip", "install", *QUIET, *options, *packages, environment=environment)

    def _call(self, step: str, *command: str, environment: dict | None = None) -> None:
        print(f"  {step}", flush=True)
        with open(self.folder / f"{step}.log", "w") as log:
            everything = {**os.environ, **(environment or {})}
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=everything, cwd=self.folder, check=True)

    def _said(self, step: str) -> str:
        lines = (self.folder / f"{step}.log").read_text().splitlines()
        return next((line for line in reversed(lines) if line.startswith("ERROR")), "see its log")

    def _tests(self) -> dict:
        """Outside the tree, on what was installed."""
        python, report = str(self.bin / "python"), self.folder / "tests.xml"
        options = ["-v", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), f"--junitxml={report}"]
        tests = [str(ROOT / "tests" / name) for name in QUICK]
        try:
            self._call("tests", python, "-m", "pytest", *options, *tests, environment={"OMP_NUM_THREADS": "1"})
        except subprocess.CalledProcessError as error:
            if error.returncode != 1:  # pytest's own faults are nobody's result
                raise
        return counted(report)


def described(facts: dict) -> dict:
    """What of ``murf-fast info --json`` the record keeps."""
    optional = {name: facts["optional"].get(name) for name in ("triton", "transformers")}
    against = {
        f"{entry['backend']} on {entry['device']}": entry["reasons"]
        for entry in facts["backends"]
        if entry["device"] == "cpu" and not entry["works"]
    }
    versions = {"python": facts["versions"]["Python"], **{n: facts["versions"][n] for n in ("torch", "numpy")}}
    # Where the extension lies is the machine's own business.
    instruction_sets = {name: fact for name, fact in facts["cpu"].items() if name != "extension"}
    return {**versions, **optional, "instruction_sets": instruction_sets, "against": against}


def counted(report: Path) -> dict:
    """Tests by how they ended, why some were skipped, which failed."""
    ended, skipped, failed = collections.Counter(), collections.Counter(), []
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag: child for child in case}
        if "failure" in kinds or "error" in kinds:
            ended["failed"] += 1
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in kinds:
            ended["skipped"] += 1
            skipped[kinds["skipped"].get("message")] += 1
        else:
            ended["passed"] += 1
    numbers = {name: ended[name] for name in ("passed", "skipped", "failed")}
    return {**numbers, "skips": dict(skipped), "failures": failed}


def cells(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    named = {"python": arguments.python, "torch": arguments.torch}
    if None not in named.values():
        yield arguments.python, arguments.torch
        return
    chosen = [cell for cell in CELLS if arguments.python in (None, cell[0]) and arguments.torch in (None, cell[1])]
    if not chosen:
        raise SystemExit("no cell of the list is that; name --python and --torch, both")
    yield from chosen


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog=".ci/versions", description=__doc__.split("\n\n")[0])
    parser.add_argument("--python", help="a version, 3.12, or a path")
    parser.add_argument("--torch", help="a version, 2.11.0")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "versions", help="folder of environments and logs"
    )
    parser.add_argument("--record", type=Path, default=tested_versions.RECORD, help="the JSON that gets the results")
    parser.add_argument("--keep", action="store_true", help="leave the environments there")
    arguments = parser.parse_args()
    good = True
    for python, torch in cells(arguments):
        print(f"Python {python}, torch {torch}", flush=True)
        cell = Cell(python, torch, arguments.work / f"{Path(python).name}-{torch}")
        made = {"date": datetime.date.today().isoformat(), "commit": commit(), "system": platform.platform(terse=True)}
        try:
            entry = {**cell.run(), **made}
            tested_versions.put(arguments.record, entry)
            good &= entry["failed"] == 0
            print(
                "  {passed} passed, {skipped} skipped, {failed} failed".format(**entry),
                *entry["failures"],
                sep="\n    ",
            )
        except NotToBeHadError as error:
            good &= arguments.python is None
            print(f"  not to be had: {error}")
        except subprocess.CalledProcessError as error:
            good = False
            print(f"  failed: {' '.join(error.cmd[:4])} ... ended with {error.returncode}, see {cell.folder}/*.log")
        finally:
            if not arguments.keep:
                cell.constraints.unlink(missing_ok=True)
                shutil.rmtree(cell.folder / "venv", ignore_errors=True)
    print(f"\n{tested_versions.table(arguments.record)}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
