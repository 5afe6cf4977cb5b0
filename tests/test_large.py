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


def test_adaptive_conv():
    channels, side = 1024, int((ELEMENTS / 1024) ** 0.5) + 2
    source = torch.randn(1, channels, 3, 4).bfloat16().contiguous(memory_format=torch.channels_last)
    kernels = torch.full((1, 1, side, side), 2.0, dtype=torch.bfloat16)
    result = murf_fast.adaptive_conv(source, kernels, mode="bilinear")
    assert result.numel() > ELEMENTS
    for y in (0, -1):
        for x in (0, -1):
            assert torch.equal(result[:, :, y, x], 2 * source[:, :, y, x])
    assert result[0, :, -1, side // 2 :].isfinite().all()


def test_bilateral_kernels():
    side, near = int((ELEMENTS / 49) ** 0.5) + 2, 20
    guidance = torch.randn(1, 1, side, side).bfloat16()
    draw = torch.Generator().manual_seed(0)
    shapes = [(), (), (2, 1), (2,), (2, 2), (2,)]
    params = murf_fast.BilateralParams(*(torch.rand(s, generator=draw) + 0.5 for s in shapes))
    result = murf_fast.bilateral_kernels(guidance, params)
    assert result.numel() > ELEMENTS
    corner = murf_fast.bilateral_kernels(guidance[:, :, -near:, -near:], params)
    assert torch.equal(result[:, :, 4 - near :, 4 - near :], corner[:, :, 4:, 4:])


def test_joint_bilateral_upsample():
    channels, side, near = 512, int((ELEMENTS / 512) ** 0.5) // 2 * 2 + 4, 16
    half = side // 2
    source = torch.randn(1, channels, half, half, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    guidance = torch.randn(1, 1, side, side)
    params = murf_fast.BilateralParams(
        torch.zeros(()), torch.ones(()), torch.ones(2, 1), torch.ones(2), torch.ones(2, 2), torch.zeros(2)
    )
    result = murf_fast.joint_bilateral_upsample(source, guidance, params, radius=1)
    assert result.numel() > ELEMENTS
    corner = murf_fast.joint_bilateral_upsample(
        source[:, :, -near // 2 :, -near // 2 :], guidance[:, :, -near:, -near:], params, radius=1
    )
    torch.testing.assert_close(result[:, :, 8 - near :, 8 - near :], corner[:, :, 8:, 8:])


@pytest.mark.parametrize(("depth", "channels"), [(2, 1024), (1024, 2)], ids=["result", "queries"])
def test_window_attention(depth, channels):
    """Queries of zeros are averages of the window; the last ones are random and checked by themselves."""
    side, near = int((ELEMENTS / 1024) ** 0.5) + 2, 5
    q = torch.zeros(1, side, side, depth, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    q[:, :, -near:, -near:].normal_()
    k, v = torch.randn(1, depth, 3, 2).bfloat16(), torch.randn(1, channels, 3, 2).bfloat16()
    options = {"windows": murf_fast.windows.full(), "num_heads": 2}
    result = murf_fast.window_attention(q, k, v, **options)
    assert max(q.numel(), result.numel()) > ELEMENTS
    corner = murf_fast.window_attention(q[:, :, -near:, -near:], k, v, **options)
    torch.testing.assert_close(result[:, :, -near:, -near:], corner)
    for y, x in ((0, 0), (0, -1), (-1, 0)):
        torch.testing.assert_close(result[0, :, y, x], v[0].float().mean((1, 2)).bfloat16())
