"""The rule of what became slower, on records made up for it, in both directions."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from murf_fast.cli.bench.compare import LEAST, changes
from murf_fast.cli.bench.records import Record


def timing(milliseconds, spread=0.02):
    median = milliseconds / 1e3
    return {"median_s": median, "p20_s": median * (1 - spread), "p80_s": median * (1 + spread), "rounds": 9}


def case(ours, *, spread=0.02, beside=None, **others):
    """Times in milliseconds; a contender may be given as (time, spread)."""
    made = {name: timing(*(t if isinstance(t, tuple) else (t,))) for name, t in others.items()}
    return {
        "op": "resize", "case": "a", "contenders": {"murf_fast": timing(ours, spread), **made}, "beside": beside
    }  # fmt: skip


def record(*cases):
    named = {f"resize: {i}": {**case, "case": str(i)} for i, case in enumerate(cases)}
    return Record(Path("record.json"), {}, {}, named, [], False, None, list(named))


def verdict(old, new, **options):
    (change,) = changes(record(old), record(new), **options)
    return change.verdict


SLOWER = [
    pytest.param(case(1, eager=4), case(1.5, eager=4), id="half as long again"),
    pytest.param(case(1, eager=4), case(1.15, eager=4), id="a little beyond the spreads"),
    pytest.param(case(1, eager=4, compile=2), case(3, eager=8, compile=4), id="on a day when all takes twice as long"),
    pytest.param(case(1, eager=4), case(1.5, eager=3.9), id="beside a contender that gained a little"),
    pytest.param(case(1, a=4, b=4.2), case(1.5, a=9, b=4.2), id="beside a contender with a bad day, not the best now"),
    pytest.param(case(1, old=1, eager=4), case(1.5, new=1, eager=4), id="with other contenders than before"),
]
SAME = [
    pytest.param(case(1, eager=4), case(1, eager=4), id="nothing"),
    pytest.param(case(1, eager=4), case(2, eager=8), id="a machine of half the speed"),
    pytest.param(case(1, eager=4), case(1, eager=2), id="a faster contender"),
    pytest.param(case(1, eager=4), case(1, eager=8), id="a slower contender"),
    pytest.param(case(1, spread=0.3, eager=4), case(1.5, spread=0.2, eager=4), id="within the old spread"),
    pytest.param(case(1, spread=0.1, eager=4), case(1.5, spread=0.5, eager=4), id="within the new spread"),
    pytest.param(case(1.2, spread=0.1, eager=2.9), case(4.7, spread=0.7, eager=7), id="both on a busy machine"),
    pytest.param(case(1, eager=(4, 0.3)), case(1.4, eager=(4, 0.1)), id="within the contender's spread"),
    pytest.param(case(1, spread=0.001, eager=(4, 0.001)), case(1.04, spread=0.001, eager=(4, 0.001)), id="4 %"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), SLOWER)
def test_slower_one_way_is_faster_the_other(old, new):
    assert verdict(old, new) == "slower"
    assert verdict(new, old) == "faster"


@pytest.mark.parametrize(("old", "new"), SAME)
def test_what_the_machine_explains_is_neither(old, new):
    assert verdict(old, new) == verdict(new, old) == "same"


def test_the_part_that_a_case_is_timed_beside_is_no_contender():
    old, new = case(2, beside=["GEMM", "eager", 2.0], GEMM=1, eager=4), case(3, GEMM=1, eager=6)
    assert verdict(old, new) == "same"  # beside the product, which took as long as before, it would be slower
    assert verdict(case(2, GEMM=1, eager=4), new) == "slower"
    assert verdict(case(2, beside=["GEMM", "eager", 2.0], GEMM=1), new) == "unjudged"


def test_without_a_common_contender_nothing_is_said():
    assert verdict(case(1, old=2), case(9, new=2)) == "unjudged"
    assert verdict(case(1), case(9)) == "unjudged"


@pytest.mark.parametrize("speed", [0.2, 1, 5])
def test_another_machine_is_judged_by_the_ratio_alone(speed):
    old, new = case(1, eager=4), case(1.5 * speed, eager=4 * speed)
    assert verdict(old, new, other_machine=True) == "slower"
    assert verdict(new, old, other_machine=True) == "faster"
    assert verdict(old, case(speed, eager=4 * speed), other_machine=True) == "same"
    wide = case(1.5 * speed, spread=0.5, eager=4 * speed)
    assert verdict(old, wide, other_machine=True) == "same"
    assert verdict(old, new) == ("same" if speed < 1 else "slower")


times = st.floats(0.01, 1000)
spreads = st.floats(0, 0.5)
pairs = st.tuples(times, spreads)


@given(pairs, pairs, pairs, pairs, st.booleans())
def test_the_two_directions_are_one_rule(ours, theirs, ours_now, theirs_now, other_machine):
    old, new = case(ours[0], spread=ours[1], eager=theirs), case(ours_now[0], spread=ours_now[1], eager=theirs_now)
    swapped = {"slower": "faster", "faster": "slower", "same": "same"}
    assert verdict(old, new, other_machine=other_machine) == swapped[verdict(new, old, other_machine=other_machine)]


@given(pairs, pairs, st.floats(0.05, 20), st.booleans())
def test_a_change_of_the_machine_alone_is_no_change(ours, theirs, factor, other_machine):
    old = case(ours[0], spread=ours[1], eager=theirs)
    new = case(ours[0] * factor, spread=ours[1], eager=(theirs[0] * factor, theirs[1]))
    assert verdict(old, new, other_machine=other_machine) == "same"


def test_the_worst_comes_first_and_only_common_cases_count():
    old = record(case(1, eager=4), case(1, eager=4), case(1, eager=4), case(1), case(1, eager=4))
    new = copy.deepcopy(record(case(1.5, eager=4), case(0.5, eager=4), case(3, eager=4), case(1), case(1, eager=4)))
    new.cases["resize: new"] = case(1, eager=1)
    found = changes(old, new)
    assert [change.name for change in found] == [f"resize: {i}" for i in (2, 0, 1, 3, 4)]
    assert [change.verdict for change in found] == ["slower", "slower", "faster", "unjudged", "same"]
    assert found[0].ratios == pytest.approx((4, 4 / 3))
    assert found[0].against == ("eager", "eager")


def test_less_than_the_least_is_noise():
    steady = {"spread": 0.0, "eager": (4, 0.0)}
    assert verdict(case(1, **steady), case(1 + 0.9 * LEAST, **steady)) == "same"
    assert verdict(case(1, **steady), case(1 + 1.1 * LEAST, **steady)) == "slower"
