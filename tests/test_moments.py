"""Statistics of parts joined, and the group norms that they come to: plain PyTorch and the Triton kernels."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from util import assert_within_budget

from murf_fast.tables.moments import group_norm, join


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_group_norm_of_parts(mean):
    """Also with a mean so far from zero that E[x^2] - E[x]^2 has nothing left in float32."""
    x = draw(1, 16, 1, 1000) + mean
    weight, bias = draw(16, seed=1), draw(16, seed=2)
    rows = x[0, :, 0].T
    parts = [torch.stack([p.mean(0), p.var(0, correction=0) * len(p)]) for p in rows.double().split(64)]
    found = join(torch.stack(parts).float(), 64, 1000)
    gain, offset = group_norm(*found, 1000, 4, weight, bias, 1e-5)
    oracle = F.group_norm(x.double(), 4, weight.double(), bias.double())
    actual = x.double() * gain.double().view(1, -1, 1, 1) + offset.double().view(1, -1, 1, 1)
    same = F.group_norm(x, 4, weight, bias)
    assert_within_budget(actual.float(), oracle, same, terms=float((gain * mean).abs().max()))


@pytest.mark.gpu_quick
@pytest.mark.parametrize("size", [(1, 1, 24), (1, 7, 16), (513, 3, 40)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_moments_in_triton(size, affine, device):
    """As those of plain PyTorch, for parts of which one is shorter; with means that differ by more than they spread."""
    moments = importlib.import_module("murf_fast.kernels.moments")
    count, each, channels = size
    total = count * each - (each - 1) // 2
    parts = torch.stack([draw(count, channels) + 1e3, draw(count, channels, seed=1).abs() * each], 1)
    oracle = join(parts, each, total)
    found = moments.join(parts.to(device), each, total)
    for a, e in zip(found, oracle, strict=True):
        torch.testing.assert_close(a.cpu(), e, rtol=1e3 * torch.finfo(torch.float64).eps, atol=0)
    weights = [draw(channels, seed=seed) if affine else None for seed in (2, 3)]
    exact = group_norm(*oracle, total, 8, *weights, 1e-5)
    actual = moments.group_norm(*found, total, 8, *(w if w is None else w.to(device) for w in weights), 1e-5)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.cpu(), e, rtol=2 * torch.finfo(torch.float32).eps, atol=0)
