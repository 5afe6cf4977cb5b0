"""The FlexAttention that ours is timed against: its mask is the window rule's, and it computes the same."""

from __future__ import annotations

import flex_windows
import pytest
import torch
from guided import draw
from torch.nn.attention.flex_attention import create_block_mask

from murf_fast import reference, windows

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CASES = {
    "rows of several blocks": ((9, 300), (5, 30), 0.1),
    "blocks of several rows": ((37, 29), (13, 11), 0.1),
    "wide windows": ((20, 24), (12, 40), 0.4),
    "whole map": ((11, 13), (16, 17), 0.5),
    "one block": ((3, 4), (2, 2), 0.1),
}


def dense(blocks, length, other):
    return blocks.repeat_interleave(128, 0)[:length].repeat_interleave(128, 1)[:, :other]


@pytest.mark.parametrize("name", CASES)
def test_the_mask_is_the_rules(name):
    """Pair by pair; and no pair lies outside of the blocks, which are a run that begins and ends with one that has."""
    size, grid, ratio = CASES[name]
    rule = windows.ratio(size, grid, ratio)
    mask = flex_windows.block_mask(rule, "cpu")
    queries, keys = size[0] * size[1], grid[0] * grid[1]
    rows, columns = (torch.from_numpy(axis.multiplicity() > 0) for axis in rule.tables())
    expected = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(queries, keys)
    assert torch.equal(mask.mask_mod(0, 0, torch.arange(queries)[:, None], torch.arange(keys)), expected)
    visited = mask.to_dense()[0, 0].bool()
    assert not (expected & ~dense(visited, queries, keys)).any()
    needed = create_block_mask(mask.mask_mod, None, None, queries, keys, device="cpu").to_dense()[0, 0].bool()
    for ours, theirs in zip(visited, needed, strict=True):
        run = theirs.nonzero()
        assert ours.sum() == run.max() - run.min() + 1
        assert bool(ours[run.min()])


def test_attention():
    rule, shapes = windows.ratio((9, 30), (4, 7), 0.1), ((16, 9, 30), (16, 4, 7), (8, 4, 7))
    q, k, v = (draw(2, *shape).double() for shape in shapes)
    result = flex_windows.split_heads(q, k, v, rule, 4)()
    torch.testing.assert_close(result, reference.window_attention(q, k, v, rule, 4, "split"))
