"""Window rules against the tables that the original implementations used, and by their definitions."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import originals
import pytest
import torch

from murf_fast import window_attention, windows


@pytest.mark.parametrize("case", ["c50", "c192"])
def test_ratio_is_anyups(case):
    data = originals.golden(f"anyup__paper_{case}")
    out, grid = tuple(data["output_size"].tolist()), data["features"].shape[2:]
    for axis, start, end in zip(windows.ratio(out, grid, 0.1).tables(), ("r0", "c0"), ("r1", "c1"), strict=True):
        assert (axis.index[:, 0] == data[start]).all()
        assert (axis.count == data[end] - data[start]).all()


def test_ratio_rounds_in_float32():
    """A size where exact arithmetic gives another table."""
    position = (np.arange(385) + 0.5) / 385
    exact = np.floor(np.clip(position - 0.1, 0, 1) * 55).astype(int)
    rows, _ = windows.ratio((385, 385), (55, 55)).tables()
    assert (rows.index[:, 0] != exact).any()
    assert abs(rows.index[:, 0] - exact).max() == 1


def test_ratio_of_nothing_is_full():
    rows, columns = windows.ratio((5, 6), (3, 4), 0.0).tables()
    assert rows.index.tolist() == [[0, 1, 2]] * 5
    assert columns.count.tolist() == [4] * 6


@pytest.mark.parametrize("case", ["int", "frac"])
def test_neighborhood_is_that_of_anyup(case):
    data = originals.golden("anyup__paper_natten")
    out, grid = tuple(data[f"{case}.output_size"].tolist()), data[f"{case}.features"].shape[2:]
    rows, columns = windows.neighborhood(out, grid, data[f"{case}.rows"].shape[1]).tables()
    assert (rows.index == data[f"{case}.rows"]).all()
    assert (columns.index == data[f"{case}.cols"]).all()


@pytest.mark.parametrize("case", ["a", "b"])
def test_neighborhood_is_that_of_naf(case):
    data = originals.golden("naf__window_attention")
    out, grid = data[f"{case}.q"].shape[2:], data[f"{case}.k"].shape[2:]
    rows, columns = windows.neighborhood(out, grid, int(data[f"{case}.kernel"])).tables()
    assert (rows.index == data[f"{case}.rows"]).all()
    assert (columns.index == data[f"{case}.cols"]).all()


def test_clamped():
    rows, columns = windows.clamped((1, 0)).tables((4, 3), (4, 3))
    read = [row[:n].tolist() for row, n in zip(rows.index, rows.count, strict=True)]
    assert read == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]
    assert columns.index.tolist() == [[0], [1], [2]]
    assert rows.multiplicity().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]


def test_given_tables():
    def ints(*values):
        return torch.tensor(values, dtype=torch.int32)

    rule = windows.ranges((ints(0, 1), ints(2, 3)), (ints(0), ints(1)), (3, 1))
    assert rule.out == (2, 1)
    assert rule.tables()[0].index.tolist() == [[0, 1], [1, 2]]
    again = windows.tables(ints([0, 1], [2, 2]), ints([0]), (3, 1))
    assert again.tables()[0].multiplicity().tolist() == [[1, 1, 0], [0, 0, 2]]
    assert again == windows.tables(ints([0, 1], [2, 2]), ints([0]), (3, 1)) != rule


INT = torch.int32


def rules() -> list[windows.Windows]:
    """One of every kind."""
    steps = torch.arange(4, dtype=INT)
    return [
        windows.tables(torch.tensor([[0, 2], [1, 1]], dtype=INT), steps[:, None], (3, 4)),
        windows.ranges((steps[:3], steps[1:]), (steps, steps + 1), (3, 4)),
        windows.ratio((5, 6), (3, 4), 0.3),
        windows.neighborhood(6, 6, 3),
        windows.clamped(1),
        windows.full(),
        windows.ratio((5, 6), (3, 4), 0.3).crop(1, 2, 3, 4),
        windows.tables(torch.tensor([[0, 2], [1, 1]], dtype=INT), steps[:, None], (3, 4)).crop(1, 1, 1, 2),
    ]


def tables_of(rule):
    return [(a.index.tolist(), a.count.tolist(), a.size) for a in rule.tables(rule.out or (4, 5), rule.grid or (4, 5))]


def test_rules_travel_to_other_processes():
    """A rule that was given as tables brings them along, into a process that has never seen them."""
    program = (
        "import pickle, sys\n"
        "rules = pickle.load(sys.stdin.buffer)\n"
        "tables = [rule.tables(rule.out or (4, 5), rule.grid or (4, 5)) for rule in rules]\n"
        "tables = [[(a.index.tolist(), a.count.tolist(), a.size) for a in pair] for pair in tables]\n"
        "pickle.dump((rules, tables), sys.stdout.buffer)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(rules()), capture_output=True, check=True, timeout=300
    )
    returned, tables = pickle.loads(result.stdout)
    assert returned == rules()
    assert tables == [tables_of(rule) for rule in rules()]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda rule: pickle.loads(pickle.dumps(rule))])
def test_copies_of_rules_are_equal(duplicate):
    for rule in rules():
        assert duplicate(rule) == rule
        assert tables_of(duplicate(rule)) == tables_of(rule)


def test_a_name_without_its_table_says_so():
    with pytest.raises(ValueError, match="given in another process"):
        windows.Windows("given 0", "given 0", (1, 1), (1, 1)).tables()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_ratio_that_leaves_a_query_without_a_key_is_named(backend):
    q, k = torch.ones(1, 2, 3, 3), torch.ones(1, 2, 2, 2)
    rule = windows.ratio(3, 2, 1e-9)
    with pytest.raises(ValueError, match="`ratio` must be so large that every query has a key, got 1e-09"):
        window_attention(q, k, k, windows=rule, num_heads=1, backend=backend)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: windows.ratio((0, 4), (2, 2)), ValueError, "`out` must be at least 1, got 0"),
        (lambda: windows.ratio(4, 2, float("nan")), ValueError, "`ratio` must be finite, got nan"),
        (lambda: windows.neighborhood(4, 4, 5), ValueError, r"must fit the height of the output, 4, got 5 \* 1"),
        (
            lambda: windows.neighborhood(9, 9, 3, stride=4),
            ValueError,
            "`stride` must be at most `kernel_size`, 3, got 4",
        ),
        (lambda: windows.clamped(-1), ValueError, "`radius` must be at least 0"),
        (lambda: windows.full().tables(), ValueError, "`out` and `grid` must be given"),
        (
            lambda: windows.tables(torch.tensor([[0], [4]], dtype=INT), torch.zeros(1, 1, dtype=INT), 3),
            ValueError,
            r"`rows` must hold indices within 0..2, got \[4\] in row 1",
        ),
        (lambda: windows.tables(torch.zeros(2, 2), torch.zeros(2, 2), 3), TypeError, "must be int32 tensors, got"),
        (
            lambda: windows.ranges((torch.zeros(2, dtype=INT),) * 2, (torch.zeros(1, dtype=INT),) * 2, 3),
            ValueError,
            r"`rows` must hold non-empty windows within 0..3, got 0..0 at 0 \(and 1 more\)",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def sliced(table, begin, length):
    return [row[:n].tolist() for row, n in zip(table.index, table.count, strict=True)][begin : begin + length]


@pytest.mark.parametrize("rule", rules(), ids=str)
def test_a_crop_is_a_slice(rule):
    out = rule.out or (4, 5)
    grid = rule.grid or (4, 5)
    top, left = out[0] // 2, 1
    height, width = out[0] - top, out[1] - 1
    part = rule.crop(top, left, height, width, out=out)
    assert part.out == (height, width)
    for whole, table, begin, length in zip(
        rule.tables(out, grid), part.tables(grid=grid), (top, left), (height, width), strict=True
    ):
        assert sliced(table, 0, length) == sliced(whole, begin, length)
        assert table.out_size == length
        assert table.taps == max(table.count)
    again = part.crop(0, width - 1, 1, 1)
    assert tables_of(again) == tables_of(rule.crop(top, left + width - 1, 1, 1, out=out))
    assert again == rule.crop(top, left + width - 1, 1, 1, out=out)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((0, 0, 6, 1), {}, "`top` and `height` must stay within the 5 pixels of the output, got 0 and 6"),
        ((0, 5, 1, 2), {}, "`left` and `width` must stay within the 6 pixels of the output, got 5 and 2"),
        ((-1, 0, 1, 1), {}, "`top` must be at least 0, got -1"),
        ((0, 0, 1, 0), {}, "`width` must be at least 1, got 0"),
        ((0, 0, 1, 1), {"out": 7}, r"`out` must be the rule's own, \(5, 6\), got \(7, 7\)"),
    ],
)
def test_bad_crops(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        windows.ratio((5, 6), (3, 4), 0.3).crop(*arguments, **options)
    with pytest.raises(ValueError, match="`out` must be given to crop it"):
        windows.clamped(1).crop(0, 0, 1, 1)
