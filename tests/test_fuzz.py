"""Random cases of every operation against right values found without the library's own definitions.

``--fuzz-cases N`` draws N cases of all operations together, ``--fuzz-seed S`` others, and ``--fuzz-case
"op:seed:index"`` repeats one, as a failure prints it.
"""

from __future__ import annotations

import pytest
from fuzz.draw import Draw
from fuzz.registry import CASES, failure_of

SHOWN = 20


def pytest_generate_tests(metafunc):
    if metafunc.function is not test_random_cases:
        return
    case = metafunc.config.getoption("--fuzz-case")
    ops = [case.split(":")[0]] if case else list(CASES)
    metafunc.parametrize("op", ops)


def test_random_cases(op, request):
    option = request.config.getoption
    if option("--fuzz-case"):
        _, seed, index = option("--fuzz-case").split(":")
        seed, indices = int(seed), [int(index)]
    else:
        seed, indices = option("--fuzz-seed"), range(-(-option("--fuzz-cases") // len(CASES)))
    failures = [text for index in indices if (text := failure_of(Draw(op, seed, index), op))]
    shown = "\n".join(failures[:SHOWN])
    assert not failures, f"{len(failures)} of {len(indices)} cases of {op}, the first {SHOWN}:\n{shown}"
