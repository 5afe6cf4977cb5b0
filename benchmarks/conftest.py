"""Shared by the suites: this machine's ceilings, and what pytest-benchmark writes."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest


def pytest_addoption(parser):
    parser.addoption("--suite", action="append", help="an operation or model of bench_all.py; may be repeated")


@pytest.fixture(scope="session")
def ceilings() -> dict:
    from measure import measured_ceilings

    return measured_ceilings()


_failed: list[str] = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A case that is refused or raises has no benchmark entry; the report must show it all the same."""
    outcome = yield
    if outcome.get_result().failed:
        reason = str(call.excinfo.value).splitlines() or [call.excinfo.typename]
        _failed.append(f"{item.name}: {reason[0]}")


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Every round's time is noise in a repository; the summaries stay."""
    output_json["failed"] = list(_failed)
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)


def pytest_benchmark_update_machine_info(config, machine_info):
    from machine import describe

    machine_info["murf_fast"] = describe()
