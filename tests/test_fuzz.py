"""Random cases of every operation against right values found without the library's own definitions.

``--fuzz-cases N`` draws N cases of all operations together, ``--fuzz-seed S`` others, and ``--fuzz-case
"op:seed:index"`` repeats one and nothing else, as a failure prints it.
"""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from fuzz.alter import alterations, beyond
from fuzz.draw import Draw
from fuzz.registry import CASES, comparisons, failure_of

import murf_fast
from murf_fast import backends

SHOWN = 20
# Operations without a backend of their own.
PLAIN = ("window_rules", "ivf_index", "au_curves", "resample_patch_embed")


def pytest_generate_tests(metafunc):
    if metafunc.function is test_random_cases:
        case = metafunc.config.getoption("--fuzz-case")
        metafunc.parametrize("op", [case.split(":")[0]] if case else list(CASES))


def test_random_cases(op, request):
    option = request.config.getoption
    if option("--fuzz-case"):
        _, seed, index, *backend = option("--fuzz-case").split(":")
        draws = [Draw(op, int(seed), int(index), *backend)]
    else:
        count = -(-option("--fuzz-cases") // len(CASES))
        draws = (Draw(op, option("--fuzz-seed"), index) for index in range(count))
    failures = [text for draw in draws if (text := failure_of(draw, op))]
    shown = "\n".join(failures[:SHOWN])
    assert not failures, f"{len(failures)} cases of {op}, the first {SHOWN}:\n{shown}"


@pytest.mark.skipif(bool(backends.reasons_against("triton", "cpu")), reason="Triton's interpreter is not here")
@pytest.mark.parametrize("op", [op for op in CASES if op not in PLAIN])
def test_random_cases_in_tritons_interpreter(op):
    failures = [text for index in range(2) if (text := failure_of(Draw(op, 0, index, backend="triton"), op))]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("op", CASES)
def test_an_element_beyond_its_band_is_wrong(op):
    """Every comparison of a few cases, with one element moved out of its band by a thousandth of it."""
    looked_at = 0
    for index in range(6):
        if failure_of(Draw(op, 1, index), op) is not None:
            continue  # a fault, which is for test_random_cases
        for check in comparisons(Draw(op, 1, index), op):
            altered = beyond(check, index)
            if altered is not None:
                looked_at += 1
                assert altered.failure() is not None, f"{op}:1:{index}: {check.name}"
    assert looked_at


@pytest.mark.parametrize("op", CASES)
def test_one_wrong_element_of_a_result_or_gradient_is_seen(op):
    """The operation itself returns one element that is off by 1e-4 of its largest value, or 8 roundings of its dtype.

    Or what is sent back through it does, by a hundredth. Not seen is what decides nothing: another label of equal
    logits, the gradient of an ignored pixel.
    """
    seen, drawn = 0, 0
    for index in range(8):
        if failure_of(Draw(op, 2, index), op) is not None:
            continue
        for alter in alterations():
            failure = failure_of(Draw(op, 2, index, change=alter), op)
            if alter.altered:
                drawn += 1
                seen += failure is not None
    assert drawn, "no case has a result"
    assert seen >= 0.5 * drawn, f"{seen} of {drawn} wrong results were seen"


def test_window_rules_travel_to_another_process():
    rules, counts = [], []
    for index in range(40):
        generator = torch.Generator().manual_seed(index)
        out, grid, taps = (tuple(torch.randint(1, 9, (2,), generator=generator).tolist()) for _ in range(3))
        tables = [
            torch.randint(0, n, (o, k), generator=generator).int() for o, n, k in zip(out, grid, taps, strict=True)
        ]
        rules.append(murf_fast.windows.tables(*tables, grid))
        counts.append([int(axis.multiplicity().sum()) for axis in rules[-1].tables()])
    code = (
        "import pickle, sys\n"
        "rules = pickle.load(sys.stdin.buffer)\n"
        "print([[int(axis.multiplicity().sum()) for axis in rule.tables()] for rule in rules])\n"
    )
    child = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(rules), capture_output=True, check=False)
    assert child.returncode == 0, child.stderr.decode()
    assert eval(child.stdout) == counts
