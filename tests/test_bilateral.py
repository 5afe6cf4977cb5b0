"""bilateral_kernels, adaptive_conv and joint_bilateral_upsample: the three share their cases and their checks."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from suite import DTYPES, HAS_GPU, KERNELS, LAYOUTS, TRITON_DTYPES, every_kernel
from util import assert_gradient_within_budget, assert_within_budget, layouts

import murf_fast
from murf_fast import BilateralParams, backends

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("range_temp", "sigma_spatial", "range_proj.0.weight", "range_proj.0.bias")
FEATUP = (
    *NAMES,
    "range_proj.3.weight",
    "range_proj.3.bias",
    *(f"fixup_proj.{n}" for n in ("0.weight", "0.bias", "3.weight", "3.bias")),
)
FEATSHARP = (*NAMES, "range_proj.2.weight", "range_proj.2.bias")
# The interpreter affords few directions, which more orders make up for.
DIRECTIONS = {"native": 20, "triton": 20 if HAS_GPU else 2}
ORDERS = {"native": 4, "triton": 8}


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def make_params(radius=3, guides=3, keys=32, fixup=True, dtype=torch.float32):
    taps = (2 * radius + 1) ** 2
    values = [
        torch.tensor(0.4),
        torch.tensor(0.9),
        draw(keys, guides),
        draw(keys),
        draw(keys, keys, scale=0.15),
        draw(keys),
    ]
    if fixup:
        inputs = taps + guides
        values += [draw(taps, inputs, scale=0.2), draw(taps), draw(taps, taps, scale=0.2), draw(taps, scale=0.1)]
    return BilateralParams(*(v.to(dtype) for v in values))


def reordered(tensors, order):
    """Guidance and parameters, or their gradients, with another order of the keys: the same function."""
    guidance, temp, sigma, weight0, bias0, weight1, bias1, *fixup = tensors
    return [
        guidance,
        temp,
        sigma,
        weight0[..., order, :],
        bias0[..., order],
        weight1[..., order, :][..., order],
        bias1[..., order],
        *fixup,
    ]


def orders_of(keys, backend="native"):
    return [torch.randperm(keys, generator=torch.Generator().manual_seed(seed)) for seed in range(ORDERS[backend])]


def on(device, call, tensors):
    return call, [t.to(device) for t in tensors]


def runs(cases, small, small_half):
    """(case, dtype, backend, device): all cases; small ones in the interpreter, a few of them in half precision."""
    triton = [(case, dtype) for dtype in TRITON_DTYPES for case in (*small, *cases)]
    if not HAS_GPU:
        triton = [(c, torch.float32) for c in small] + [(c, torch.float16) for c in small_half]
    of = {"native": [(case, dtype) for dtype in DTYPES for case in cases], "triton": triton}
    return [
        pytest.param(case, dtype, *kernel.values, id=f"{kernel.id}-{dtype}-{case}", marks=kernel.marks)
        for kernel in KERNELS
        for case, dtype in of[kernel.id]
    ]


def evaluated(call, tensors, dtype, backend, directions):
    """The result, and the gradients of every tensor in several directions."""
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    out = call(leaves, backend)
    gradients = []
    for seed in range(directions):
        direction = draw(*out.shape, seed=seed).to(tensors[0].dtype).to(out)
        gradients.append(torch.autograd.grad(out, leaves, direction, retain_graph=True))
    return [out.detach(), *(torch.stack(g) for g in zip(*gradients, strict=True))]


def assert_parity(call, tensors, dtype, name="result", orders=(), backend="native"):
    """`call(tensors, backend)` within the budget of the reference in the same dtype, forward and every gradient.

    Gradients are taken in many directions and judged together: the reference's error in a single scalar may be any
    small number by chance, and a budget of twice that means nothing. All carry the rounding of the same logits, which
    the softmax magnifies and which a sum over the pixels may cancel or add up by chance. ``orders`` of the keys, which
    mean nothing, draw from the reference's error: its worst counts.
    """
    tensors, directions = [t.to(dtype) for t in tensors], DIRECTIONS[backend]
    oracle = evaluated(call, tensors, torch.float64, "reference", directions)
    theirs = [evaluated(call, tensors, dtype, "reference", directions)]
    for order in orders:
        out, *gradients = evaluated(call, reordered(tensors, order), dtype, "reference", directions)
        theirs.append([out, *reordered(gradients, order.argsort())])
    for i, actual in enumerate(evaluated(call, tensors, dtype, backend, directions)):
        same = max((t[i] for t in theirs), key=lambda t: float((t.double() - oracle[i]).norm()))
        check = assert_gradient_within_budget if i else assert_within_budget
        check(actual, oracle[i], same, f"{name}: {f'gradient {i - 1}' if i else 'result'}")


# (radius, fixup, guides, keys, batch, height, width): tile borders, smallest grids, other widths of the networks.
KERNEL_CASES = (
    (3, True, 3, 32, 2, 9, 13),
    (3, False, 3, 32, 1, 4, 4),
    (3, True, 3, 32, 1, 5, 129),
    (3, False, 1, 7, 2, 37, 17),
    (2, True, 5, 11, 1, 33, 6),
    (1, True, 3, 8, 2, 2, 2),
    (5, True, 3, 32, 1, 7, 6),
    (0, True, 2, 4, 1, 3, 1),
)
# The interpreter's: FeatUp, FeatSharp, SimFeatUp, one under and over a tile of pixels and a block of keys.
SMALL_KERNELS = (
    (3, True, 3, 32, 2, 4, 4),
    (3, False, 3, 32, 1, 5, 4),
    (3, True, 3, 33, 1, 4, 33),
    (5, True, 3, 32, 1, 6, 6),
    (2, False, 1, 5, 1, 3, 31),
    (1, True, 3, 8, 2, 2, 2),
    (0, True, 2, 4, 1, 3, 1),
)


def kernels_of(case):
    radius, fixup, guides, keys, batch, height, width = case

    def call(tensors, backend):
        return murf_fast.bilateral_kernels(tensors[0], BilateralParams(*tensors[1:]), radius=radius, backend=backend)

    return call, [
        draw(batch, guides, height, width),
        *(p for p in make_params(radius, guides, keys, fixup) if p is not None),
    ]


@pytest.mark.parametrize(("case", "dtype", "backend", "device"), runs(KERNEL_CASES, SMALL_KERNELS, SMALL_KERNELS[1::4]))
def test_kernels(case, dtype, backend, device):
    assert_parity(*on(device, *kernels_of(case)), dtype, str(case), orders_of(case[3], backend), backend)


def test_kernels_every_level(level):
    for case in KERNEL_CASES[:5]:
        assert_parity(*kernels_of(case), torch.float32, str(case), orders_of(case[3]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_layouts(layout):
    params, guidance = make_params(), draw(2, 3, 8, 9)
    expected = murf_fast.bilateral_kernels(guidance, params)
    assert torch.equal(murf_fast.bilateral_kernels(layouts(guidance)[layout], params), expected)


@every_kernel
def test_kernels_masks(backend, device):
    call, tensors = on(device, *kernels_of(SMALL_KERNELS[0] if backend == "triton" else KERNEL_CASES[0]))
    range_mask = (draw(2, 32) > 0).float().to(device) / 0.9
    fixup_mask = (draw(2, 49) > 0).float().to(device) / 0.9

    def masked(leaves, backend):
        params = BilateralParams(*leaves[1:])
        return murf_fast.bilateral_kernels(
            leaves[0], params, range_mask=range_mask, fixup_mask=fixup_mask, backend=backend
        )

    # Orders under which the mask stays what it is: of the keys with equal columns of it.
    orders = [torch.arange(32) for _ in range(ORDERS[backend])]
    for seed, order in enumerate(orders):
        generator = torch.Generator().manual_seed(seed)
        for column in range_mask.unique(dim=1).T:
            keys = (range_mask == column[:, None]).all(0).nonzero().flatten().cpu()
            order[keys] = keys[torch.randperm(len(keys), generator=generator)]
        assert torch.equal(range_mask[:, order], range_mask)
    assert_parity(masked, tensors, torch.float32, orders=orders, backend=backend)
    assert not torch.equal(masked(tensors, backend), call(tensors, backend))


# (radius, source size, size, mode, padding): FeatUp, FeatSharp by 2 and 3, the drop-in, odd and non-integer ratios.
CONV_CASES = (
    (3, (4, 5), (8, 10), "bicubic", "reflect"),
    (3, (5, 4), (10, 8), "bilinear", "reflect"),
    (3, (4, 3), (12, 9), "bilinear", "reflect"),
    (3, (13, 16), (7, 10), None, None),
    (3, (7, 10), (7, 10), None, "reflect"),
    (3, (2, 2), (4, 4), "bicubic", "reflect"),
    (2, (5, 7), (13, 33), "bicubic", "replicate"),
    (2, (5, 7), (11, 9), "bilinear", "constant"),
    (2, (9, 11), (4, 5), "bicubic", "reflect"),
    (1, (1, 1), (2, 5), "bicubic", "reflect"),
    (5, (20, 6), (40, 12), "bicubic", "reflect"),
    (0, (3, 4), (5, 9), "bilinear", None),
    (1, (4, 6), (9, 14), "bilinear", None),
)
# The interpreter's: FeatUp, FeatSharp by 2 and 3, the drop-in, one under and over a tile, the smallest grids.
SMALL_CONVS = (
    (3, (4, 5), (8, 10), "bicubic", "reflect"),
    (3, (3, 2), (6, 4), "bilinear", "reflect"),
    (3, (3, 2), (9, 6), "bilinear", "reflect"),
    (3, (11, 9), (5, 3), None, None),
    (3, (4, 9), (4, 9), None, "reflect"),
    (5, (3, 4), (6, 8), "bicubic", "reflect"),
    (2, (5, 7), (4, 17), "bicubic", "replicate"),
    (2, (9, 11), (4, 5), "bilinear", "constant"),
    (1, (1, 1), (2, 3), "bicubic", "reflect"),
    (0, (2, 3), (3, 5), "bilinear", None),
)


def conv_of(case, channels=19, batch=2):
    radius, source, size, mode, padding = case

    def call(tensors, backend):
        return murf_fast.adaptive_conv(
            tensors[0], tensors[1], size, mode=mode, padding=padding, bias=tensors[2], backend=backend
        )

    return call, [draw(batch, channels, *source), draw(batch, (2 * radius + 1) ** 2, *size), draw(channels)]


@pytest.mark.parametrize(("case", "dtype", "backend", "device"), runs(CONV_CASES, SMALL_CONVS, SMALL_CONVS[:4]))
def test_conv(case, dtype, backend, device):
    tensors = conv_of(case, batch=1 if backend == "triton" else 2)
    assert_parity(*on(device, *tensors), dtype, str(case), backend=backend)


@pytest.mark.parametrize("channels", [1, 16, 65, 150])
def test_conv_every_level(level, channels):
    for case in CONV_CASES[:4]:
        assert_parity(*conv_of(case, channels, 1), torch.float32, str(case))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel_layout", LAYOUTS)
def test_conv_layouts(layout, kernel_layout):
    call, (source, kernels, bias) = conv_of(CONV_CASES[0])
    expected = call([source, kernels, bias], "native")
    actual = call([layouts(source)[layout], layouts(kernels)[kernel_layout], bias], "native")
    assert torch.equal(actual, expected)


@every_kernel
@pytest.mark.parametrize(
    ("layout", "dtype"), [("channels_last", DTYPES[0]), ("tokens", TRITON_DTYPES[1]), ("sliced", TRITON_DTYPES[-1])]
)
def test_conv_tiles(layout, dtype, backend, device):
    """More channels than a block, more pixels than a tile in both directions, and tiles of every layout."""
    call, (source, kernels, bias) = conv_of((3, (5, 6), (10, 18), "bicubic", "reflect"), 70, 1)
    tensors = [layouts(source)[layout], layouts(kernels)[layout], bias]
    assert_parity(*on(device, call, tensors), dtype, layout, backend=backend)


@every_kernel
def test_conv_with_float32_kernels(backend, device):
    """Half-precision maps lose nothing of float32 kernels: what is left is the rounding of the result."""
    call, tensors = on(device, *conv_of(SMALL_CONVS[0], 19, 1))
    source, bias = tensors[0].half(), tensors[2].half()
    actual = call([source, tensors[1], bias], backend)
    oracle = call([source.double(), tensors[1].double(), bias.double()], "reference")
    assert_within_budget(actual, oracle, oracle.half())


@every_kernel
def test_what_is_not_finite_stays_in_the_windows_that_read_it(backend, device):
    """Also weights beyond half precision, whose products are within."""
    call, (source, kernels, bias) = on(device, *conv_of((1, (6, 8), (4, 6), None, None), 19, 1))
    source[0, 3, 1, 2], source[0, 7, 4, 6] = torch.nan, torch.inf
    actual, expected = (call([source, kernels, bias], b) for b in (backend, "reference"))
    assert torch.equal(actual.isfinite(), expected.isfinite())
    assert 0 < actual.isfinite().logical_not().sum() <= 2 * 9
    expected_grad, actual_grad = (
        torch.autograd.grad(call([source.requires_grad_(), kernels, bias], b).sum(), source)[0]
        for b in ("reference", backend)
    )
    assert torch.equal(actual_grad.isfinite(), expected_grad.isfinite())

    large = [source.detach().nan_to_num(0, 0, 0).half() * 1e-3, kernels * 1e5, bias.half()]
    oracle = call([t.double() for t in large], "reference")
    assert_within_budget(call(large, backend), oracle, oracle.half())


@given(
    radius=st.integers(0, 3),
    source=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(4, 24), st.integers(4, 24)),
    mode=st.sampled_from(["bilinear", "bicubic"]),
    padding=st.sampled_from(["reflect", "replicate", "constant", None]),
    channels=st.integers(1, 40),
)
@settings(max_examples=40, deadline=None)
def test_conv_any_shape(radius, source, size, mode, padding, channels):
    assert_parity(*conv_of((radius, source, size, mode, padding), channels, 1), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_level(dtype):
    def call(tensors, backend):
        return murf_fast.joint_bilateral_upsample(
            tensors[0], tensors[1], BilateralParams(*tensors[2:]), backend=backend
        )

    assert_parity(call, [draw(2, 21, 5, 7), draw(2, 3, 10, 14), *make_params()], dtype)


def test_several_sources_share_the_kernels():
    params, guidance = make_params(), draw(1, 3, 12, 14)
    sources = [draw(1, 5, 6, 7), draw(1, 17, 6, 7)]
    for result, source in zip(murf_fast.joint_bilateral_upsample(sources, guidance, params), sources, strict=True):
        assert torch.equal(result, murf_fast.joint_bilateral_upsample(source, guidance, params))


BANDED = (
    # batch, channels, source, size, radius, mode, fixup, dtype of source, of guidance
    (1, 21, (33, 5), (66, 10), 3, "bicubic", True, torch.float32, torch.float32),
    (2, 16, (17, 6), (51, 18), 3, "bilinear", False, torch.float32, torch.float32),
    (1, 5, (9, 9), (31, 20), 1, "bicubic", True, torch.bfloat16, torch.bfloat16),
    (2, 33, (20, 4), (40, 8), 5, "bicubic", True, torch.float16, torch.float32),
)


@pytest.mark.parametrize("case", BANDED, ids=str)
def test_without_gradients_bands_give_the_same(case, three_threads, monkeypatch):
    batch, channels, source, size, radius, mode, fixup, dtype, guidance_dtype = case
    launcher = importlib.import_module("murf_fast.native.joint_bilateral_upsample")
    monkeypatch.setattr(launcher, "_KERNEL_BYTES", 1)  # as few rows at a time as ever
    maps = [draw(batch, channels, *source).to(dtype), draw(batch, 7, *source, seed=1).to(dtype)]
    guidance, params = draw(batch, 3, *size).to(guidance_dtype), make_params(radius, fixup=fixup)
    options = {"radius": radius, "mode": mode, "range_mask": (draw(batch, 32) > 0).float()}
    banded = murf_fast.joint_bilateral_upsample(maps, guidance, params, **options)
    leaves = [m.requires_grad_() for m in maps]
    whole = murf_fast.joint_bilateral_upsample(leaves, guidance, params, **options)
    for b, w in zip(banded, whole, strict=True):
        assert w.requires_grad
        assert torch.equal(b, w)


@pytest.mark.parametrize("fixup", [True, False])
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_triton_level_in_bands_and_in_two_passes(dtype, fixup, device):
    """In bands without gradients and in two passes with them; two sources share the kernels."""
    sources = [draw(2, c, 3, 4).to(device, dtype) for c in (21, 7)]
    guidance, params = draw(2, 3, 6, 8).to(device, dtype), make_params(fixup=fixup)
    params = BilateralParams(*(p if p is None else p.to(device) for p in params))

    def level(maps, guidance, backend):
        return murf_fast.joint_bilateral_upsample(maps, guidance, params, backend=backend)

    oracle = level([s.double() for s in sources], guidance.double(), "reference")
    same = level(sources, guidance, "reference")
    for banded, o, s in zip(level(sources, guidance, "triton"), oracle, same, strict=True):
        assert_within_budget(banded, o, s)
    leaves = [s.detach().requires_grad_() for s in sources]
    for banded, whole in zip(level(sources, guidance, "triton"), level(leaves, guidance, "triton"), strict=True):
        assert whole.requires_grad
        assert torch.equal(banded, whole)


@pytest.mark.parametrize("row_bytes", [1, 3000])
def test_triton_bands(row_bytes, device, monkeypatch):
    """Bands of a tile's rows, and of several images, give what one band gives."""
    from murf_fast.kernels import folded

    monkeypatch.setattr(folded, "BAND_BYTES", row_bytes)
    pieces = list(folded.bands(3, 10, 100, 4))
    assert sum(band.images * band.rows for band in pieces) == 30
    assert len(pieces) == (9 if row_bytes == 1 else 1)
    case = (1, (9, 2), (18, 4), "bicubic", "reflect")
    assert_parity(*on(device, *conv_of(case, 3, 2)), torch.float32, str(case), backend="triton")
    case = (1, True, 3, 8, 2, 5, 2)
    assert_parity(*on(device, *kernels_of(case)), torch.float32, str(case), orders_of(8, "triton"), "triton")
    params = BilateralParams(*(p.to(device) for p in make_params(1, keys=8)))

    def level(tensors, backend):
        return murf_fast.joint_bilateral_upsample(*tensors, params, radius=1, backend=backend)

    tensors = [draw(2, 5, 9, 2).to(device), draw(2, 3, 18, 4).to(device)]
    oracle = level([t.double() for t in tensors], "reference")
    assert_within_budget(level(tensors, "triton"), oracle, level(tensors, "reference"))


@every_kernel
def test_autocast_changes_nothing(backend, device):
    call, tensors = on(device, *kernels_of(SMALL_KERNELS[0]))
    expected = call(tensors, backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(call(tensors, backend), expected)


@every_kernel
def test_rows_of_a_level(backend, device):
    """Bit for bit those of the whole."""
    sources, guidance = [draw(2, c, 5, 3).to(device) for c in (4, 2)], draw(2, 3, 11, 6).to(device)
    params = BilateralParams(*(p.to(device) for p in make_params(1, keys=8)))
    options = {"radius": 1, "bias": None, "backend": backend}
    whole = murf_fast.joint_bilateral_upsample(sources, guidance, params, **options)
    for begin, end in ((0, 2), (4, 9), (3, 4), (9, 11), (0, 11)):
        results = murf_fast.joint_bilateral_upsample(sources, guidance, params, rows=(begin, end), **options)
        for result, w in zip(results, whole, strict=True):
            assert torch.equal(result, w[:, :, begin:end])


def test_gradients_of_rows_of_a_level():
    params, leaf = make_params(1, keys=8), draw(1, 4, 5, 3).requires_grad_()
    results = [
        murf_fast.joint_bilateral_upsample(leaf, draw(1, 3, 11, 6), params, radius=1, rows=rows)
        for rows in ((3, 8), None)
    ]
    of_rows, of_all = (torch.autograd.grad(r.square().sum(), leaf)[0] for r in (results[0], results[1][:, :, 3:8]))
    assert torch.equal(of_rows, of_all)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_level_in_a_layout(memory_format):
    source, guidance, params, bias = draw(1, 21, 5, 7), draw(1, 3, 10, 14), make_params(), draw(21)
    options = {"bias": bias, "memory_format": memory_format}
    result = murf_fast.joint_bilateral_upsample(source, guidance, params, **options)
    assert result.is_contiguous(memory_format=memory_format)
    assert torch.equal(result, murf_fast.joint_bilateral_upsample(source, guidance, params, bias=bias))


def golden(file, prefix=""):
    with np.load(GOLDEN / file) as arrays:
        return {k.removeprefix(prefix): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith(prefix)}


def assert_golden(data, names, output, suffix, mode, backend, dtype, allowed):
    leaves = [data[n].to(dtype).requires_grad_() for n in ("source", "guidance", *(f"param.{n}" for n in names))]
    result = murf_fast.joint_bilateral_upsample(
        leaves[0], leaves[1], BilateralParams(*leaves[2:]), mode=mode, backend=backend
    )
    assert (result - data[output]).abs().max() <= allowed * data[output].abs().max()
    gradients = torch.autograd.grad(result, leaves, data["grad_output"].to(dtype))
    keys = ("source", "guidance", *names)
    for key, gradient in zip(keys, gradients, strict=True):
        expected = data.get(f"grad.{key}{suffix}", data.get(f"grad_{key}{suffix}"))
        assert (gradient - expected).abs().max() <= allowed * expected.abs().max(), key


# Allowed: what the files' authors measured for float32 (1.1e-5, 2e-5), and float32's own rounding in float64.
@pytest.mark.parametrize(
    ("backend", "dtype", "allowed"), [("reference", torch.float64, 3e-7), ("native", torch.float32, 1.1e-5)]
)
def test_featup_level(backend, dtype, allowed):
    assert_golden(golden("featup_level_grads.npz"), FEATUP, "output", "", "bicubic", backend, dtype, allowed)


@pytest.mark.parametrize("factor", ["x2.", "x3."])
@pytest.mark.parametrize(
    ("backend", "dtype", "allowed"), [("reference", torch.float64, 3e-7), ("native", torch.float32, 2e-5)]
)
def test_featsharp_level(factor, backend, dtype, allowed):
    data = golden("featsharp__jbu_levels.npz", factor)
    assert_golden(data, FEATSHARP, "output.f64", ".f64", "bilinear", backend, dtype, allowed)


def test_gradcheck():
    def call(source, guidance, *params):
        return murf_fast.joint_bilateral_upsample(source, guidance, BilateralParams(*params), radius=1)

    params = make_params(1, 3, 4, dtype=torch.float64)
    leaves = [draw(1, 2, 2, 2).double(), draw(1, 3, 4, 3).double(), *params]
    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in leaves])


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_registration(needs_gradient):
    _, tensors = kernels_of(KERNEL_CASES[5])
    guidance, *params = [t.requires_grad_(needs_gradient) for t in tensors]
    mask = torch.ones(2, 8)
    ops = torch.ops.murf_fast
    if not needs_gradient:
        sources = [draw(2, 5, 2, 2), draw(2, 3, 1, 2)]
        arguments = (sources, guidance, params, mask, None, None, [1, 2], 1, "bicubic", [True, False], "native")
        torch.library.opcheck(ops.joint_bilateral_upsample.default, arguments)
    torch.library.opcheck(ops.bilateral_kernels.default, (guidance, params, mask, None, 1, "float32", "native"))
    for layout in ("contiguous", "channels_last"):
        _, (source, kernels, bias) = conv_of(CONV_CASES[6])
        arguments = [t.requires_grad_(needs_gradient) for t in (layouts(source)[layout], kernels, bias)]
        torch.library.opcheck(
            ops.adaptive_conv.default, (*arguments, "bicubic", "replicate", layout == "channels_last", "native")
        )


def test_registration_of_triton(device):
    _, (guidance, *params) = on(device, *kernels_of(SMALL_KERNELS[5]))
    ops = torch.ops.murf_fast
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (guidance, params, None, None, 1, "float32", "triton")
    torch.library.opcheck(ops.bilateral_kernels.default, arguments, test_utils=checks)
    _, tensors = on(device, *conv_of(SMALL_CONVS[8]))
    arguments = (*tensors, "bicubic", "reflect", True, "triton")
    torch.library.opcheck(ops.adaptive_conv.default, arguments, test_utils=checks)


def level_and_gradients(leaves):
    leaves = [t.detach().requires_grad_() for t in leaves]
    result = murf_fast.joint_bilateral_upsample(leaves[0], leaves[1], BilateralParams(*leaves[2:]), backend="native")
    return [result.detach(), *torch.autograd.grad(result, leaves, torch.ones_like(result))]


def test_threads():
    leaves = [draw(1, 21, 33, 9), draw(1, 3, 66, 18), *make_params()]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = level_and_gradients(leaves)
        torch.set_num_threads(3)
        results = [level_and_gradients(leaves)]
    finally:
        torch.set_num_threads(before)
    workers = [threading.Thread(target=lambda: results.append(level_and_gradients(leaves))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    for result in results:
        for a, e in zip(result, expected, strict=True):
            assert torch.equal(a, e)


def test_compile():
    leaves = [draw(1, 5, 4, 4), draw(1, 3, 8, 8), *make_params()]

    def function(*tensors):
        return murf_fast.joint_bilateral_upsample(tensors[0] * 2, tensors[1], BilateralParams(*tensors[2:])) * 3

    torch.compiler.reset()
    leaves = [t.requires_grad_() for t in leaves]
    expected, actual = function(*leaves), torch.compile(function, fullgraph=True)(*leaves)
    assert torch.equal(actual, expected)
    direction = torch.ones_like(expected)
    for a, e in zip(
        torch.autograd.grad(actual, leaves, direction), torch.autograd.grad(expected, leaves, direction), strict=True
    ):
        assert torch.equal(a, e)


@every_kernel
@pytest.mark.parametrize("batch", [0, 1])
def test_empty_batch(batch, backend, device):
    params = BilateralParams(*(p.to(device) for p in make_params()))
    source, guidance = draw(batch, 5, 4, 4).to(device), draw(batch, 3, 8, 8).to(device)
    result = murf_fast.joint_bilateral_upsample(source, guidance, params, backend=backend)
    assert result.shape == (batch, 5, 8, 8)
    assert not result.isnan().any()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"guidance": torch.ones(2, 3, 8, 8)}, ValueError, "`guidance` must have the batch size of `source`, 1, got 2"),
        ({"guidance": torch.ones(1, 4, 8, 8)}, ValueError, r"`params.range_weight0` .* 4 channels .* got \(32, 3\)"),
        ({"guidance": torch.ones(1, 3, 3, 8)}, ValueError, "needs at least 4 rows and columns"),
        ({"guidance": torch.ones(1, 3, 8, 8).half()}, TypeError, "`guidance` must have the dtype of `source`"),
        ({"guidance": torch.ones(1, 3, 8, 8).double()}, TypeError, "`guidance` must have the dtype of `source`"),
        ({"source": [torch.ones(1, 5, 4, 4), torch.ones(2, 5, 4, 4)]}, ValueError, r"`source\[1\]` .* batch size"),
        ({"bias": torch.ones(4)}, ValueError, r"`bias` must have shape \(5,\)"),
        ({"range_mask": torch.ones(1, 31)}, ValueError, r"`range_mask` must have shape \(1, 32\)"),
        ({"fixup_mask": torch.ones(2, 49)}, ValueError, r"`fixup_mask` must have shape \(1, 49\)"),
        ({"radius": 2}, ValueError, r"`params.fixup_weight0` must have shape \(25, 28\)"),
        ({"radius": 1.5}, TypeError, "`radius` must be an integer"),
        ({"params": make_params()._replace(fixup_bias1=None)}, ValueError, "lacks fixup_bias1"),
        ({"params": list(make_params())}, TypeError, "`params` must be a BilateralParams"),
        ({"mode": "area"}, ValueError, "`mode` must be one of"),
        ({"rows": (3, 9)}, ValueError, r"`rows` must be \(begin, end\) within 8 rows, got \(3, 9\)"),
        ({"rows": (3, 3)}, ValueError, r"`rows` must be \(begin, end\) within 8 rows, got \(3, 3\)"),
        ({"rows": (-1, 3)}, ValueError, "`rows` must be at least 0, got -1"),
    ],
)
def test_bad_input_of_a_level(change, error, words):
    arguments = {
        "source": torch.ones(1, 5, 4, 4),
        "guidance": torch.ones(1, 3, 8, 8),
        "params": make_params(),
        **change,
    }
    with pytest.raises(error, match=words):
        murf_fast.joint_bilateral_upsample(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"kernels": torch.ones(1, 16, 8, 8)}, ValueError, "D odd .* got 16"),
        ({"kernels": torch.ones(1, 50, 8, 8)}, ValueError, "D odd .* got 50"),
        ({"kernels": torch.ones(2, 49, 8, 8)}, ValueError, "batch size of `source`, 1, got 2"),
        ({"kernels": torch.ones(1, 49, 8, 8).half()}, TypeError, "`kernels` must have the dtype of `source`"),
        ({"kernels": torch.ones(1, 49, 8, 3)}, ValueError, "at least 4 rows and columns"),
        ({"size": 9}, ValueError, "`size` must be that of `kernels`"),
        ({"padding": "circular"}, ValueError, "`padding` must be None or one of"),
        ({"mode": None}, ValueError, r"`source` must be \(8, 8\)"),
        ({"mode": None, "padding": None}, ValueError, r"`source` must be \(14, 14\)"),
        ({"bias": torch.ones(3)}, ValueError, r"`bias` must have shape \(5,\)"),
    ],
)
def test_bad_input_of_a_conv(change, error, words):
    arguments = {"source": torch.ones(1, 5, 4, 4), "kernels": torch.ones(1, 49, 8, 8), **change}
    with pytest.raises(error, match=words):
        murf_fast.adaptive_conv(**arguments)


def test_requests_that_cannot_be_met(device, monkeypatch):
    params = BilateralParams(*(p.to(device) for p in make_params()))
    source, guidance = draw(1, 5, 4, 4).to(device), draw(1, 3, 8, 8).to(device)
    with pytest.raises(backends.BackendUnavailableError, match="float64 runs through the reference only"):
        murf_fast.joint_bilateral_upsample(source.double(), guidance.double(), params, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(backends.BackendUnavailableError, match="only in its interpreter"):
        murf_fast.bilateral_kernels(guidance.cpu(), make_params(), backend="triton")
    with pytest.raises(backends.BackendUnavailableError, match="only in its interpreter"):
        murf_fast.adaptive_conv(source.cpu(), draw(1, 49, 8, 8), backend="triton")


def test_more_than_2_31_elements(gpu):
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    size = (1500, 1501)
    source = torch.randn(1, 1024, 20, 20, device=gpu, dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last
    )
    kernels = torch.randn(1, 49, *size, device=gpu)
    out = murf_fast.adaptive_conv(source, kernels, backend="triton")
    assert out.numel() > 2**31
    last = source[:, -1:]
    oracle = murf_fast.adaptive_conv(last.double(), kernels.double(), backend="reference")
    same = murf_fast.adaptive_conv(last, kernels, backend="reference")
    assert_within_budget(out[:, -1:, -4:], oracle[:, :, -4:], same[:, :, -4:])
    back = torch.ops.murf_fast.adaptive_conv_backward_source(
        out, kernels, [20, 20], "bicubic", "reflect", True, "triton"
    )
    leaf = last.double().requires_grad_()
    whole = murf_fast.adaptive_conv(leaf, kernels.double(), backend="reference")
    (oracle,) = torch.autograd.grad(whole, leaf, out[:, -1:].double())
    assert_within_budget(back[:, -1:], oracle, oracle.bfloat16())


def test_repeats_other_stream_and_graph_capture(gpu):
    leaves = [draw(1, 21, 33, 9).to(gpu), draw(1, 3, 66, 18).to(gpu), *(p.to(gpu) for p in make_params())]

    def everything():
        tensors = [t.detach().requires_grad_() for t in leaves]
        out = murf_fast.joint_bilateral_upsample(tensors[0], tensors[1], BilateralParams(*tensors[2:]))
        return [out.detach(), *torch.autograd.grad(out, tensors, torch.ones_like(out))]

    def level():
        return murf_fast.joint_bilateral_upsample(leaves[0], leaves[1], BilateralParams(*leaves[2:]))

    expected = everything()
    assert all(torch.equal(a, e) for a, e in zip(everything(), expected, strict=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = [level(), everything()]
    torch.cuda.synchronize()
    assert torch.equal(other[0], expected[0])
    assert all(torch.equal(a, e) for a, e in zip(other[1], expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = level()
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected[0])
