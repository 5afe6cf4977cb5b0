"""pytest's side of the stage `check`: failures at once, a line of JSON for every test, and an end to dead contexts.

A worker of pytest-xdist whose context is dead ends itself, and is replaced: the test it was at counts as failed, the
others go on in the new process.
"""

from __future__ import annotations

import json
import os
import re

import gpu_context
import pytest

DEAD = 70  # exit status of a process with a dead context
_in_worker = False


def pytest_configure(config):
    global _in_worker
    _in_worker = hasattr(config, "workerinput")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    gpu_context.plant(op_of(item.nodeid))
    return (yield)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    if not _in_worker:
        _say(report)
    # The report has been sent: this comes last.
    if report.failed and gpu_context.is_dead():
        if _in_worker:
            os._exit(DEAD)
        pytest.exit("the CUDA context is dead", DEAD)


def _say(report) -> None:
    if report.failed:
        print(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext}", flush=True)
    if report.skipped or (report.passed and report.when != "call"):
        return
    line = {"id": report.nodeid.split("/")[-1], "op": op_of(report.nodeid), "passed": report.passed}
    with open(os.environ["MURF_FAST_CHECK_REPORT"], "a") as file:
        file.write(json.dumps(line) + "\n")


def op_of(nodeid: str) -> str:
    """What a test is of: its last parameter in test_gpu_quick.py, else the name of its file."""
    file, _, parameters = re.fullmatch(r".*?test_(\w+)\.py::\w+(\[(.*)\])?", nodeid, re.DOTALL).groups()
    return re.match(r"\w+", parameters.rpartition("-")[2])[0] if parameters and file == "gpu_quick" else file
