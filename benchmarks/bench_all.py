"""Every case of the registry on this CPU, as a pytest-benchmark suite; ``--suite NAME`` (repeatable) chooses."""

from __future__ import annotations

import registry
from measure import run


def pytest_generate_tests(metafunc):
    wanted = metafunc.config.getoption("suite") or registry.suites()
    cases = [c for c in registry.cases() if c.op in wanted and "cpu" in c.devices]
    metafunc.parametrize("case", cases, ids=lambda c: c.id)


def test(benchmark, case, ceilings):
    run(benchmark, case, ceilings)
