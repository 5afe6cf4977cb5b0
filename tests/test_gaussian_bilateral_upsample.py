"""gaussian_bilateral_upsample: parity and gradients of every map, the original's results, windows, bad input."""

from __future__ import annotations

import functools

import originals
import pytest
import torch
from suite import DTYPES, HAS_GPU, LAYOUTS, TRITON_DTYPES, for_triton
from util import assert_gradient_within_budget, assert_within_budget, layouts

import murf_fast
from murf_fast.tables.disk import disk_counts

NAMES = ("features", "guidance", "sigma_x", "sigma_y", "theta", "sigma_r", "low_guidance")
# (batch, channels, guides), cells, pixels, radius, reach: primes, one cell, one column, fewer pixels than cells, more
# pixels of a cell than are worked on together, few channels and many, windows of one radius and of several.
CASES = (
    ((2, 5, 3), (5, 7), (23, 31), 3, 0.11),
    ((1, 3, 3), (2, 3), (19, 31), 7, None),
    ((1, 37, 1), (6, 3), (20, 33), 2, None),
    ((1, 70, 3), (1, 1), (5, 7), 4, 2.0),
    ((1, 17, 2), (9, 8), (7, 5), 2, None),
    ((1, 130, 4), (4, 1), (16, 4), 5, 0.31),
    ((1, 16, 3), (11, 12), (33, 36), 2, 0.23),
)
DIRECTIONS = {"native": 10, "triton": 10 if HAS_GPU else 3}
SMALL = (((1, 5, 3), (3, 4), (9, 10), 2, 0.23), ((2, 18, 2), (5, 1), (4, 3), 3, None))


def inputs(case, dtype=torch.float32, layout="contiguous"):
    """Features, guidance, the cells' maps, the low guidance; Gaussians about as wide as a cell."""
    (batch, channels, guides), (h, w), (height, width), _, _ = case
    generator = torch.Generator().manual_seed(height)

    def draw(*shape, function=torch.rand):
        return function(shape, generator=generator)

    pitch = (height / h + width / w) / 2
    maps = [pitch * (0.3 + 1.5 * draw(batch, 1, h, w)) for _ in range(2)]
    maps += [draw(batch, 1, h, w, function=torch.randn), 0.1 + 0.3 * draw(batch, 1, h, w)]
    features, guidance = draw(batch, channels, h, w, function=torch.randn), draw(batch, guides, height, width)
    tensors = [features, guidance, *maps, draw(batch, guides, h, w)]
    tensors[:2] = [layouts(x)[layout] for x in tensors[:2]]
    return [x.to(dtype) for x in tensors]


def call(tensors, case, backend=None):
    *first, low = tensors
    return murf_fast.gaussian_bilateral_upsample(
        *first, low_guidance=low, radius=case[3], reach=case[4], backend=backend
    )


def evaluated(tensors, case, backend, dtype, directions):
    """The result, and the gradients of every tensor in several directions of ``dtype``."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out, gradients = call(leaves, case, backend), []
    for seed in range(directions):
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(out)
        gradients.append(torch.autograd.grad(out, leaves, direction, retain_graph=True))
    return [out.detach(), *(torch.stack(g) for g in zip(*gradients, strict=True))]


@functools.cache
def references(case, dtype, directions):
    """By the reference in float64 and in ``dtype``: one computation for every level and layout."""
    tensors = inputs(case, dtype)
    return [evaluated([t.to(d) for t in tensors], case, "reference", dtype, directions) for d in (torch.double, dtype)]


def check(case, dtype, layout, backend, device="cpu"):
    """Gradients in many directions are judged together: the reference's error in few numbers may be small by chance."""
    tensors, directions = [t.to(device) for t in inputs(case, dtype, layout)], DIRECTIONS[backend]
    actual = evaluated(tensors, case, backend, dtype, directions)
    for name, a, o, s in zip(("result", *NAMES), actual, *references(case, dtype, directions), strict=True):
        judge = assert_within_budget if name == "result" else assert_gradient_within_budget
        assert a.dtype == dtype
        judge(a.cpu(), o, s, f"{case}: {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, dtype, level):
    for layout in LAYOUTS if dtype == torch.float32 else ("tokens",):
        check(case, dtype, layout, "native")


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("case", for_triton(SMALL, CASES), ids=str)
def test_triton(case, dtype, device):
    for layout in ("tokens", "contiguous") if dtype == torch.float32 else ("tokens",):
        check(case, dtype, layout, "triton", device)


def test_triton_shares_pixels_of_a_block(device):
    """Cells gather from more tiles of pixels than there are programs for them, and blocks of them overlap."""
    check(((1, 3, 1), (5, 2), (17, 9), 1, None), torch.float32, "contiguous", "triton", device)


def test_golden(level):
    """The original's result and gradients; its windows have every radius from 4 to 8."""
    data = {name: torch.from_numpy(array) for name, array in originals.golden("upsample_anything").items()}

    def results(dtype, backend=None):
        leaves = [data[name].to(dtype).requires_grad_() for name in NAMES[:-1]]
        out = murf_fast.gaussian_bilateral_upsample(*leaves, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, data["direction"].to(dtype))]

    oracle, actual = results(torch.float64), results(torch.float32)
    for name, a, o in zip(("output", *(f"grad.{n}" for n in NAMES[:-1])), actual, oracle, strict=True):
        assert (data[name] - o).norm() <= 1e-4 * o.norm(), name  # float32 rounding: it is the same function
        assert_within_budget(a, o, data[name], name)


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 2), (6, 7)], ids=str)
@pytest.mark.parametrize("radius", [1, 2, 5])
def test_counts_are_those_of_clamped_offsets(grid, radius):
    counts = disk_counts(radius, torch.device("cpu")).exp().round().long()
    kind = [[2 if n == 1 else int(i in (0, n - 1)) for i in range(n)] for n in grid]
    for r in range(1, radius + 1):
        for y in range(grid[0]):
            for x in range(grid[1]):
                expected = torch.zeros(grid, dtype=torch.long)
                for i in range(-r, r + 1):
                    for j in range(-r, r + 1):
                        if i * i + j * j <= r * r:
                            expected[min(max(y + i, 0), grid[0] - 1), min(max(x + j, 0), grid[1] - 1)] += 1
                for i, j in expected.nonzero().tolist():
                    assert counts[kind[0][i], kind[1][j], r, abs(i - y), abs(j - x)] == expected[i, j]
                inside = [counts[kind[0][i], kind[1][j], r, abs(i - y), abs(j - x)] for i in range(grid[0])
                          for j in range(grid[1]) if abs(i - y) <= radius and abs(j - x) <= radius]  # fmt: skip
                assert sum(inside) == expected.sum()


def test_one_sharp_cell_is_nearest_and_wide_ones_average():
    """Where the guidance says nothing: narrow Gaussians take the cell of a pixel, the widest of windows all of them."""
    features, guidance = torch.randn(1, 6, 4, 5), torch.zeros(1, 1, 12, 15)
    ones = torch.ones(1, 1, 4, 5)
    sharp = murf_fast.gaussian_bilateral_upsample(features, guidance, 0.2 * ones, 0.2 * ones, ones, ones)
    assert torch.equal(sharp, features.repeat_interleave(3, 2).repeat_interleave(3, 3))
    wide = murf_fast.gaussian_bilateral_upsample(
        features, guidance, 1e6 * ones, 1e6 * ones, ones, ones, radius=32, reach=None
    )
    # The disk around cell (i, j) clamps unequally to the border; for one cell there is nothing to weigh.
    assert wide.std(dim=(2, 3)).max() < features.std(dim=(2, 3)).min()
    one = murf_fast.gaussian_bilateral_upsample(features[:, :, :1, :1], guidance, *[ones[..., :1, :1]] * 4)
    torch.testing.assert_close(one, features[:, :, :1, :1].expand_as(one))


def test_small_gradients_in_float16(level):
    """Those of a mean over an image are subnormal in half precision, and are taken at their value."""
    tensors = inputs(CASES[0], torch.float16)
    maps = [t.float().requires_grad_() for t in tensors[2:6]]
    results = []
    for backend in ("native", "reference"):
        out = murf_fast.gaussian_bilateral_upsample(*tensors[:2], *maps, radius=3, reach=None, backend=backend)
        results.append(torch.autograd.grad(out, maps, torch.full_like(out, 2e-6)))
    for actual, expected in zip(*results, strict=True):
        assert expected.abs().max() > 1e-7
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_gradcheck():
    case = ((1, 2, 2), (3, 2), (5, 6), 2, None)
    tensors = [t.double().requires_grad_() for t in inputs(case)]
    assert torch.autograd.gradcheck(lambda *t: call(t, case), tensors)


def test_registration():
    case = ((2, 3, 2), (3, 2), (5, 6), 2, None)
    features, guidance, *maps, low = inputs(case)
    radii = torch.full((2, 1, 5, 6), 2, dtype=torch.uint8)
    leaves = [t.requires_grad_() for t in (features, guidance, low, *maps)]
    op = torch.ops.murf_fast.gaussian_bilateral_upsample.default
    torch.library.opcheck(op, (*leaves, radii, 2, False, "native"))
    arguments = (torch.randn(2, 3, 5, 6), *(t.detach() for t in leaves), None, 2, [True] * 7, "native")
    torch.library.opcheck(torch.ops.murf_fast.gaussian_bilateral_upsample_backward.default, arguments)


def test_compile_and_threads(three_threads):
    case = CASES[-1]
    tensors = inputs(case)
    torch.compiler.reset()
    compiled = torch.compile(lambda *t: call(t, case) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), call(tensors, case) * 2)
    several = evaluated(tensors, case, "native", torch.float32, 1)
    torch.set_num_threads(1)
    alone = evaluated(tensors, case, "native", torch.float32, 1)
    assert all(torch.equal(a, b) for a, b in zip(several, alone, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"sigma_x": torch.ones(1, 1, 3, 4)}, ValueError, "`sigma_x` must have shape (1, 1, 4, 3), got (1, 1, 3, 4)"),
        ({"theta": torch.ones(1, 1, 4, 3).int()}, TypeError, "`theta` must be a floating-point tensor"),
        ({"guidance": torch.ones(2, 3, 8, 9)}, ValueError, "`guidance` must have the batch size of `features`, 1"),
        ({"guidance": torch.ones(1, 3, 8, 9).half()}, TypeError, "`guidance` must have the dtype of `features`"),
        ({"low_guidance": torch.ones(1, 2, 4, 3)}, ValueError, "`low_guidance` must have shape (1, 3, 4, 3)"),
        ({"radius": 0}, ValueError, "`radius` must be 1 to 32 cells, got 0"),
        ({"radius": 33}, ValueError, "`radius` must be 1 to 32 cells, got 33"),
        ({"radius": 2.5}, TypeError, "`radius` must be an integer"),
        ({"reach": 0.0}, ValueError, "`reach` must be positive, got 0.0"),
        ({"features": torch.ones(1, 2, 4)}, ValueError, "`features` must be (B, C, H, W)"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {name: torch.ones(1, 1, 4, 3) for name in NAMES[2:6]}
    arguments |= {"features": torch.ones(1, 2, 4, 3), "guidance": torch.ones(1, 3, 8, 9)}
    murf_fast.gaussian_bilateral_upsample(**arguments)
    with pytest.raises(error) as raised:
        murf_fast.gaussian_bilateral_upsample(**arguments | change)
    assert f"murf_fast.gaussian_bilateral_upsample: {words}" in str(raised.value)
