"""Sums whose program goes down the result and keeps rows of the maps, and copies of maps that give whole vectors."""

from __future__ import annotations

import pytest
import torch
from util import assert_within_budget, layouts

import murf_fast

pytest.importorskip("triton")

from murf_fast.kernels.aligned_maps import aligned_maps

# Sizes of the maps, of the result, and how: rows read by many, by one and by none; exact positions, of which bicubic
# weights leave one tap; five taps.
CASES = {
    "one map to fourteen times its size": ([(2, 3)], (28, 5), {}),
    "maps of several sizes": ([(3, 2), (7, 5), (9, 4)], (21, 6), {}),
    "rows that nobody reads": ([(40, 6), (3, 3)], (7, 4), {}),
    "bicubic, every third exact": ([(7, 2)], (21, 3), {"mode": "bicubic"}),
    "bicubic, rows that nobody reads": ([(53, 2)], (9, 3), {"mode": "bicubic"}),
    "bicubic, antialiased": ([(5, 2), (4, 4)], (19, 3), {"mode": "bicubic", "antialias": True}),
    "nearest": ([(6, 3)], (20, 4), {"mode": "nearest"}),
    "as large as the result": ([(11, 4), (5, 2)], (11, 4), {}),
}


@pytest.fixture(params=[2, 5, 64])
def rows_each(request, monkeypatch):
    """Rows of a program, whatever the size of the result."""
    import sys

    module = sys.modules["murf_fast.kernels.upsample_sum"]
    monkeypatch.setattr(module, "rows_of_a_program", lambda height, across: request.param)


def maps_of(sizes, channels: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, channels, *size, generator=generator) for size in sizes]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CASES)
def test_triton(name, layout, rows_each, device):
    sizes, size, how = CASES[name]
    maps, bias = [layouts(m)[layout].to(device) for m in maps_of(sizes)], torch.randn(2, 3).to(device)
    actual = murf_fast.upsample_sum(maps, size, bias=bias, **how, backend="triton")
    oracle = murf_fast.upsample_sum([m.double() for m in maps], size, bias=bias.double(), **how, backend="reference")
    same = murf_fast.upsample_sum(maps, size, bias=bias, **how, backend="reference")
    assert_within_budget(actual, oracle, same, name)


def test_triton_a_row_that_is_not_read_may_hold_anything(rows_each, device):
    x = maps_of([(40, 6)])[0].to(device)
    expected = murf_fast.upsample_sum([x], (7, 4), backend="triton")
    read = murf_fast.tables.resize.axis(40, 7).dense().any(0)
    x[:, :, torch.from_numpy(~read)] = torch.nan
    assert not read.all()
    assert torch.equal(murf_fast.upsample_sum([x], (7, 4), backend="triton"), expected)


def test_maps_are_copied_for_whole_vectors():
    """Only where that is cheap, and only those that need it."""
    maps = maps_of([(2, 3), (4, 5)], channels=19)
    copies, readable = aligned_maps(maps, 80)
    assert readable == 32
    for map_, copy in zip(maps, copies, strict=True):
        assert copy.stride(1) == 1
        assert all(copy.stride(i) % 16 == 0 for i in (0, 2, 3))
        assert torch.equal(copy[:, :19], map_)
    assert aligned_maps(maps, 79) == (maps, 19)
    aligned = [m.contiguous(memory_format=torch.channels_last) for m in maps_of([(2, 3), (4, 5)], channels=32)]
    kept, readable = aligned_maps(aligned, 6)
    assert readable == 32
    assert all(a is b for a, b in zip(kept, aligned, strict=True))
    mixed, readable = aligned_maps([aligned[0], aligned[1].contiguous()], 80)
    assert mixed[0] is aligned[0]
    assert mixed[1].stride(1) == 1
    assert readable == 32
