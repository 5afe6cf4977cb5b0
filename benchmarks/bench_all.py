"""Every case of the registry on this CPU, as a pytest-benchmark suite. ``--suite NAME`` and ``--case NAME`` choose,
and may be repeated; ``--record FILE`` keeps every case as soon as it is measured, and ``--resume`` goes on with such a
file.
"""

from __future__ import annotations

import registry
from measure import quick_cases, run
from record import RECORD


def pytest_generate_tests(metafunc):
    metafunc.parametrize("case", chosen(metafunc.config), ids=lambda c: c.id)


def chosen(config) -> list[registry.Case]:
    """The cases that the options name and that the record has not yet."""
    suites, names = config.getoption("suite") or registry.suites(), config.getoption("case")
    cases = [c for c in registry.cases() if c.op in suites and "cpu" in c.devices]
    if config.getoption("quick"):
        cases = quick_cases(cases)
    if names:
        cases = [c for c in cases if c.id in names]
    record = config.stash.get(RECORD, None)
    if record is None:
        return cases
    record.planned = [c.id for c in cases]
    return [c for c in cases if c.id not in record.kept]


def test(benchmark, case, ceilings, request):
    run(benchmark, case, ceilings, request.config.getoption("quick"))
