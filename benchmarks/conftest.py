"""Shared by the suites: their options, this machine's ceilings, and what is written of every case."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest


def pytest_addoption(parser):
    parser.addoption("--suite", action="append", help="an operation or model of bench_all.py; may be repeated")
    parser.addoption("--case", action="append", help="a case of bench_all.py, 'operation: name'; may be repeated")
    parser.addoption("--quick", action="store_true", help="one small case of every operation; needs --record")
    parser.addoption("--record", metavar="FILE", help="written anew after every case")
    parser.addoption("--resume", action="store_true", help="keep the cases that the record has, and measure the others")


def pytest_configure(config):
    import interruption
    import registry
    from measure import QUICK_SCALE
    from record import RECORD, Record

    if config.getoption("record"):
        interruption.wait_for_calls()
        config.stash[RECORD] = Record(config)
    elif config.getoption("quick") or config.getoption("resume"):
        raise pytest.UsageError("--quick and --resume need --record")
    if config.getoption("quick"):
        registry.scale_down(QUICK_SCALE)


def pytest_runtest_setup(item):
    import interruption

    interruption.check()


@pytest.fixture(scope="session")
def ceilings(request) -> dict:
    from measure import measured_ceilings

    return {} if request.config.getoption("quick") else measured_ceilings()


_failed: list[str] = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A case that is refused or raises has no benchmark entry; the record must show it all the same."""
    from record import RECORD

    outcome = yield
    report = outcome.get_result()
    if report.failed:
        reason = str(call.excinfo.value).splitlines() or [call.excinfo.typename]
        _failed.append(f"{item.name}: {reason[0]}")
    if RECORD in item.config.stash and (report.failed or report.when == "call"):
        item.config.stash[RECORD].write()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Every round's time is noise in a repository; the summaries stay."""
    from record import RECORD

    output_json["failed"] = list(_failed)
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
        entry["params"] = {"case": entry["param"]}  # not the object
    if RECORD in config.stash:
        record = config.stash[RECORD]
        output_json["benchmarks"][:0] = record.kept.values()
        output_json["murf_fast"] = record.header()


def pytest_benchmark_update_machine_info(config, machine_info):
    from machine import describe

    machine_info["murf_fast"] = describe()
