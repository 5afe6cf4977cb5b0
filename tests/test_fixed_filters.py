"""The baselines with nothing learned: joint bilateral upsampling with fixed widths, and the guided filter."""

from __future__ import annotations

import math

import pytest
import torch
from guided import draw
from util import assert_gradient_within_budget, assert_within_budget, layouts, nudged, worst

from murf_fast.nn import FixedJBU, GuidedFilter
from murf_fast.reference.fixed_jbu import fixed_jbu
from murf_fast.reference.guided_filter import guided_filter

CASES = {
    # source, guidance, guides
    "whole steps": ((5, 4), (20, 16), 3),
    "fractions": ((5, 7), (17, 31), 1),
    "one side kept": ((6, 5), (6, 23), 3),
    "the same size": ((7, 9), (7, 9), 2),
    "a column": ((9, 1), (13, 3), 3),
}
every_case = pytest.mark.parametrize("name", CASES)
BUILD = {
    "FixedJBU": (lambda: FixedJBU(0.8, 0.3, radius=2), lambda s, g: fixed_jbu(s, g, 0.8, 0.3, 2)),
    "GuidedFilter": (lambda: GuidedFilter(2, 0.05), lambda s, g: guided_filter(s, g, 2, 0.05)),
}
every_module = pytest.mark.parametrize("module", BUILD)


def inputs(name):
    grid, size, guides = CASES[name]
    return draw(2, 5, *grid) + 1, draw(2, guides, *size).sigmoid()


@every_module
@every_case
def test_parity(module, name):
    (build, plain), arguments = BUILD[module], inputs(name)
    oracle = plain(*(x.double() for x in arguments))
    same = worst([plain(*(nudged(x, i) for x in arguments)) for i in range(3)], oracle)
    for shape in ("contiguous", "channels_last", "sliced"):
        source, guidance = (layouts(x)[shape] for x in arguments)
        result = build()(source, guidance)
        assert_within_budget(result, oracle, same)
        if shape == "channels_last":
            assert result.is_contiguous(memory_format=torch.channels_last)
    half = build()(arguments[0].bfloat16(), arguments[1])
    assert half.dtype == torch.bfloat16
    assert_within_budget(half, plain(arguments[0].bfloat16().double(), arguments[1].double()), half.double())
    assert_within_budget(build()(*(x.double() for x in arguments)).float(), oracle, same)


@every_module
def test_gradients(module):
    build, plain = BUILD[module]

    def gradients(call, source, guidance):
        leaves = [x.clone().requires_grad_() for x in (source, guidance)]
        result = call(*leaves)
        directions = [draw(*result.shape, seed=i).to(result.dtype) for i in range(6)]
        found = [torch.autograd.grad(result, leaves, d, retain_graph=True) for d in directions]
        return [torch.stack(g) for g in zip(*found, strict=True)]

    arguments = inputs("fractions")
    oracle = gradients(plain, *(x.double() for x in arguments))
    theirs = [gradients(plain, *(nudged(x, i) for x in arguments)) for i in range(4)]
    for i, actual in enumerate(gradients(build(), *arguments)):
        assert_gradient_within_budget(actual, oracle[i], worst([t[i] for t in theirs], oracle[i]))


def test_kopf_pixel_by_pixel():
    """Products of Gaussians, divided by their sum, as the paper writes it."""
    source, guidance = (x.double() for x in inputs("fractions"))
    (h, w), (height, width) = source.shape[2:], guidance.shape[2:]
    small = torch.nn.functional.adaptive_avg_pool2d(guidance, (h, w))
    expected = torch.zeros(2, 5, height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            at_y, at_x, total = (y + 0.5) * h / height - 0.5, (x + 0.5) * w / width - 0.5, 0
            for i in range(math.ceil(max(at_y - 2, 0)), math.floor(min(at_y + 2, h - 1)) + 1):
                for j in range(math.ceil(max(at_x - 2, 0)), math.floor(min(at_x + 2, w - 1)) + 1):
                    spatial = math.exp(-((at_y - i) ** 2 + (at_x - j) ** 2) / (2 * 0.8**2))
                    difference = (guidance[:, :, y, x] - small[:, :, i, j]).square().sum(1, keepdim=True)
                    weight = spatial * (-difference / (2 * 0.3**2)).exp()
                    expected[:, :, y, x] += weight * source[:, :, i, j]
                    total = total + weight
            expected[:, :, y, x] /= total
    # In float64, but for what rounding makes of thirty weights.
    torch.testing.assert_close(FixedJBU(0.8, 0.3, radius=2)(source, guidance), expected, rtol=1e-12, atol=1e-12)


def test_guided_filter_window_by_window():
    """Ridge regression in every window, as the paper writes it."""
    source, guidance = (x.double() for x in inputs("the same size"))
    height, width = source.shape[2:]
    windows = {
        (y, x): (..., slice(max(y - 2, 0), y + 3), slice(max(x - 2, 0), x + 3))
        for y in range(height)
        for x in range(width)
    }
    total, count = torch.zeros_like(source), torch.zeros(height, width)
    for window in windows.values():
        i, p = guidance[window].flatten(2).mT, source[window].flatten(2).mT
        mean = i.mean(1, keepdim=True)
        ridge = (i - mean).mT @ (i - mean) / i.shape[1] + 0.05 * torch.eye(2, dtype=torch.float64)
        slope = torch.linalg.solve(ridge, (i - mean).mT @ p / i.shape[1])
        total[window] += ((i - mean) @ slope + p.mean(1, keepdim=True)).mT.unflatten(2, total[window].shape[2:])
        count[window] += 1
    torch.testing.assert_close(GuidedFilter(2, 0.05)(source, guidance), total / count, rtol=1e-12, atol=1e-12)


@every_module
def test_edges_are_kept(module):
    """A step of the guidance that lies within a pixel of the source divides the result there."""
    guidance = (torch.arange(64) >= 26).float().expand(1, 1, 64, 64)
    source = torch.nn.functional.adaptive_avg_pool2d(guidance, 16) * 2 + 1
    build = {"FixedJBU": FixedJBU(1.0, 0.1), "GuidedFilter": GuidedFilter(1, 1e-4)}[module]
    result = build(source, guidance)[0, 0, 32]
    assert result[25] < 1.6
    assert result[26] > 2.4


def test_scores_far_below_zero():
    """A pixel like none of its window has the most similar one's value: nothing is divided by zero."""
    guidance = torch.zeros(1, 3, 16, 16)
    guidance[..., 8, 8] = 100.0
    result = FixedJBU(0.5, 0.01)(draw(1, 4, 4, 4), guidance)
    assert bool(result.isfinite().all())


@every_module
def test_compile(module):
    build, plain = BUILD[module]
    arguments = inputs("whole steps")
    torch.compiler.reset()
    result = torch.compile(build(), fullgraph=True, backend="aot_eager")(*arguments)
    assert_within_budget(result, plain(*(x.double() for x in arguments)), plain(*arguments))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda s, g: FixedJBU(0, 0.1), ValueError, "`sigma_spatial` must be positive, got 0"),
        (lambda s, g: FixedJBU(1, 1e-20), ValueError, "`sigma_range` must be one whose inverse square is finite"),
        (lambda s, g: FixedJBU(1, 1e-200), ValueError, "`sigma_range` must be one whose inverse square is finite"),
        (lambda s, g: FixedJBU(1, -0.1), ValueError, "`sigma_range` must be positive, got -0.1"),
        (lambda s, g: FixedJBU(1, 0.1, radius=0), ValueError, "`radius` must be at least 1, got 0"),
        (lambda s, g: GuidedFilter(1, 0), ValueError, "`eps` must be positive, got 0"),
        (lambda s, g: FixedJBU(1, 0.1)(s, g[:1]), ValueError, "`guidance` must have the batch size of `source`, 2"),
        (lambda s, g: FixedJBU(1, 0.1)(s, g.half()), TypeError, "`guidance` must have the dtype of `source`"),
        (lambda s, g: GuidedFilter(1, 0.1)(s[0], g), ValueError, r"`source` must be \(B, C, H, W\)"),
        (lambda s, g: GuidedFilter(1, 0.1)(s, g[..., :3]), ValueError, "must be at least as large as `source`"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(*inputs("whole steps"))
