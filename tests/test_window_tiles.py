"""Tiles of queries and keys for the GPU's window attention: complete, in steps of eight, and as few as they can be."""

from __future__ import annotations

import numpy as np
import pytest

from murf_fast.tables.window_tiles import NONE, SIDE, axis_tiles
from murf_fast.windows import axis_window

RULES = (
    ("ratio 0.1", 448, 32),
    ("ratio 0.1", 101, 37),
    ("neighborhood 7 1 1", 64, 64),
    ("neighborhood 3 1 2", 31, 31),
    ("neighborhood 5 2 3", 46, 13),
    ("clamped 3", 19, 19),
    ("full", 1, 1),
    ("full", 9, 17),
)


@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_pair_is_in_one_tile(rule, of_keys):
    reads = axis_window(*rule).multiplicity() > 0
    reads = reads.T if of_keys else reads
    tiles = axis_tiles(*rule, of_keys)
    assert sorted(tiles.members[tiles.members != NONE]) == list(range(len(reads)))
    assert tiles.members.shape[1] == SIDE
    assert tiles.partners.shape[1] == SIDE * tiles.most_steps
    for members, partners, steps in zip(tiles.members, tiles.partners, tiles.steps, strict=True):
        own = members[members != NONE]
        union = np.nonzero(reads[own].any(0))[0]
        assert partners[: len(union)].tolist() == union.tolist()
        assert (partners[len(union) :] == NONE).all()
        assert steps == -(-len(union) // SIDE)


@pytest.mark.parametrize(
    ("rule", "tiles", "steps"),
    [
        (("ratio 0.1", 448, 32), 56, 56),  # AnyUp: eight queries read eight keys
        (("neighborhood 7 1 1", 64, 64), 8, 16),  # eight tokens read fourteen
        (("neighborhood 3 1 2", 64, 64), 10, 10),  # a dilation's groups apart: six tokens of one read eight
    ],
)
def test_tiles_are_few(rule, tiles, steps):
    made = axis_tiles(*rule)
    assert (len(made), int(made.steps.sum())) == (tiles, steps)


def test_keys_that_no_query_reads_have_tiles():
    tiles = axis_tiles("ratio 0.01", 2, 20, of_keys=True)
    assert sorted(tiles.members[tiles.members != NONE]) == list(range(20))
    assert 0 in tiles.steps
