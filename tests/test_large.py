"""Results of more than 2^31 elements: every address is 64-bit."""

from __future__ import annotations

import psutil
import pytest
import torch

import murf_fast

ELEMENTS = 2**31
NEEDED = 12 << 30


@pytest.fixture(autouse=True)
def room():
    available = psutil.virtual_memory().available
    if available < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GB of free memory, {available >> 30} GB are free")


@pytest.mark.parametrize(
    ("channels", "memory_format"), [(1024, torch.channels_last), (64, torch.contiguous_format)], ids=str
)
def test_upsample_concat(channels, memory_format):
    side = int((ELEMENTS / channels) ** 0.5) + 2
    maps = [torch.randn(1, channels // 2, 3, 2).bfloat16(), torch.randn(1, channels // 2, 2, 5).bfloat16()]
    result = murf_fast.upsample_concat(maps, (side, side), memory_format=memory_format)
    assert result.numel() > ELEMENTS
    for y in (0, -1):
        for x in (0, -1):  # corners of a resize are corners of the map
            assert torch.equal(result[:, :, y, x], torch.cat([m[:, :, y, x] for m in maps], dim=1))
    assert result[0, :, -1, side // 2 :].isfinite().all()


def test_upsample_mean_of_one_huge_plane():
    side = int(ELEMENTS**0.5) + 2
    corners = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    result = murf_fast.upsample_mean([corners.view(1, 1, 2, 2)], (side, side))[0, 0]
    assert result.numel() > ELEMENTS
    assert [result[y, x].item() for y in (0, -1) for x in (0, -1)] == [1.0, 2.0, 3.0, 4.0]
    assert result[-1].isfinite().all()
    middle = result[side // 2, side // 2].item()
    assert abs(middle - 2.5) <= torch.finfo(torch.bfloat16).eps * 4
