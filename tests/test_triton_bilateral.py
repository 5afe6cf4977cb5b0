"""The Triton kernels of the bilateral ops against the float64 reference: on the GPU where there is one, else in
Triton's interpreter, which affords small shapes and few directions; a GPU also gets the CPU's cases.
"""

from __future__ import annotations

import pytest
import test_bilateral as cpu
import torch
from suite import HAS_GPU, TRITON_DTYPES
from test_bilateral import CONV_CASES, KERNEL_CASES, conv_of, draw, kernels_of, make_params
from util import assert_within_budget, layouts

pytest.importorskip("triton")

import murf_fast
from murf_fast import BilateralParams, backends
from murf_fast.kernels import folded, launch

DTYPES = TRITON_DTYPES
DIRECTIONS = 20 if HAS_GPU else 2
ORDERS = 8

# (radius, fixup, guides, keys, batch, height, width): FeatUp, FeatSharp, SimFeatUp, one under and over a tile of pixels
# and a block of keys, the smallest grids.
SMALL_KERNELS = (
    (3, True, 3, 32, 2, 4, 4),
    (3, False, 3, 32, 1, 5, 4),
    (3, True, 3, 33, 1, 4, 33),
    (5, True, 3, 32, 1, 6, 6),
    (2, False, 1, 5, 1, 3, 31),
    (1, True, 3, 8, 2, 2, 2),
    (0, True, 2, 4, 1, 3, 1),
)
# (radius, source size, size, mode, padding), as in CONV_CASES.
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
# The interpreter has time for a few cases in half precision.
ALL_KERNELS = [(case, dtype) for dtype in DTYPES for case in (*SMALL_KERNELS, *KERNEL_CASES)]
ALL_CONVS = [(case, dtype) for dtype in DTYPES for case in (*SMALL_CONVS, *CONV_CASES)]
if not HAS_GPU:
    ALL_KERNELS = [(c, torch.float32) for c in SMALL_KERNELS] + [(c, torch.float16) for c in SMALL_KERNELS[1::4]]
    ALL_CONVS = [(c, torch.float32) for c in SMALL_CONVS] + [(c, torch.float16) for c in SMALL_CONVS[:4]]


def moved(call, tensors, device):
    return call, [t.to(device) for t in tensors]


def assert_parity(call, tensors, dtype, name, orders=()):
    cpu.assert_parity(call, tensors, dtype, name, orders, "triton", DIRECTIONS)


def orders_of(keys):
    return cpu.orders_of(keys, ORDERS)


@pytest.mark.parametrize(("case", "dtype"), ALL_KERNELS, ids=str)
def test_kernels(case, dtype, device):
    assert_parity(*moved(*kernels_of(case), device), dtype, str(case), orders_of(case[3]))


def test_kernels_with_masks(device):
    call, tensors = kernels_of(SMALL_KERNELS[0])
    masks = {"range_mask": (draw(2, 32) > 0).float() / 0.9, "fixup_mask": (draw(2, 49) > 0).float() / 0.9}
    masks = {name: mask.to(device) for name, mask in masks.items()}

    def masked(leaves, backend):
        return murf_fast.bilateral_kernels(leaves[0], BilateralParams(*leaves[1:]), **masks, backend=backend)

    call, tensors = moved(masked, tensors, device)
    assert_parity(call, tensors, torch.float32, "masks")


@pytest.mark.parametrize(("case", "dtype"), ALL_CONVS, ids=str)
def test_conv(case, dtype, device):
    assert_parity(*moved(*conv_of(case, 19, 1), device), dtype, str(case))


@pytest.mark.parametrize(
    ("layout", "dtype"), [("channels_last", DTYPES[0]), ("tokens", DTYPES[1]), ("sliced", DTYPES[-1])], ids=str
)
def test_conv_layouts(layout, dtype, device):
    """More channels than a block, more pixels than a tile in both directions, and channels_last tiles."""
    call, (source, kernels, bias) = conv_of((3, (5, 6), (10, 18), "bicubic", "reflect"), 70, 1)
    tensors = [layouts(source)[layout], layouts(kernels)[layout], bias]
    assert_parity(*moved(call, tensors, device), dtype, layout)


def test_conv_with_float32_kernels(device):
    """Half-precision maps lose nothing of float32 kernels: what is left is the rounding of the result."""
    call, tensors = moved(*conv_of(SMALL_CONVS[0], 19, 1), device)
    source, bias = tensors[0].half(), tensors[2].half()
    actual = call([source, tensors[1], bias], "triton")
    oracle = call([source.double(), tensors[1].double(), bias.double()], "reference")
    assert_within_budget(actual, oracle, oracle.half())


def test_what_is_not_finite_stays_in_the_windows_that_read_it(device):
    """Also weights beyond half precision, whose products are within."""
    call, (source, kernels, bias) = moved(*conv_of((1, (6, 8), (4, 6), None, None), 19, 1), device)
    source[0, 3, 1, 2], source[0, 7, 4, 6] = torch.nan, torch.inf
    actual, expected = (call([source, kernels, bias], backend) for backend in ("triton", "reference"))
    assert torch.equal(actual.isfinite(), expected.isfinite())
    assert 0 < actual.isfinite().logical_not().sum() <= 2 * 9
    expected_grad, actual_grad = (
        torch.autograd.grad(call([source.requires_grad_(), kernels, bias], backend).sum(), source)[0]
        for backend in ("reference", "triton")
    )
    assert torch.equal(actual_grad.isfinite(), expected_grad.isfinite())

    large = [source.detach().nan_to_num(0, 0, 0).half() * 1e-3, kernels * 1e5, bias.half()]
    oracle = call([t.double() for t in large], "reference")
    assert_within_budget(call(large, "triton"), oracle, oracle.half())


@pytest.mark.parametrize("fixup", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_level(dtype, fixup, device):
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
def test_bands(row_bytes, device, monkeypatch):
    """Bands of a tile's rows, and of several images, give what one band gives."""
    monkeypatch.setattr(folded, "BAND_BYTES", row_bytes)
    pieces = list(folded.bands(3, 10, 100, 4))
    assert sum(band.images * band.rows for band in pieces) == 30
    assert len(pieces) == (9 if row_bytes == 1 else 1)
    case = (1, (9, 2), (18, 4), "bicubic", "reflect")
    assert_parity(*moved(*conv_of(case, 3, 2), device), torch.float32, str(case))
    case = (1, True, 3, 8, 2, 5, 2)
    assert_parity(*moved(*kernels_of(case), device), torch.float32, str(case), orders_of(8))
    params = BilateralParams(*(p.to(device) for p in make_params(1, keys=8)))

    def level(tensors, backend):
        return murf_fast.joint_bilateral_upsample(*tensors, params, radius=1, backend=backend)

    tensors = [draw(2, 5, 9, 2).to(device), draw(2, 3, 18, 4).to(device)]
    oracle = level([t.double() for t in tensors], "reference")
    assert_within_budget(level(tensors, "triton"), oracle, level(tensors, "reference"))


def test_autocast_changes_nothing(device):
    call, tensors = moved(*kernels_of(SMALL_KERNELS[0]), device)
    expected = call(tensors, "triton")
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(call(tensors, "triton"), expected)


def test_registration(device):
    _, (guidance, *params) = moved(*kernels_of(SMALL_KERNELS[5]), device)
    ops = torch.ops.murf_fast
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (guidance, params, None, None, 1, torch.float32, "triton")
    torch.library.opcheck(ops.bilateral_kernels.default, arguments, test_utils=checks)
    _, tensors = moved(*conv_of(SMALL_CONVS[8]), device)
    arguments = (*tensors, "bicubic", "reflect", True, "triton")
    torch.library.opcheck(ops.adaptive_conv.default, arguments, test_utils=checks)


def test_empty_batch(device):
    params = BilateralParams(*(p.to(device) for p in make_params()))
    source, guidance = torch.empty(0, 5, 4, 4, device=device), torch.empty(0, 3, 8, 8, device=device)
    assert murf_fast.joint_bilateral_upsample(source, guidance, params, backend="triton").shape == (0, 5, 8, 8)


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


def test_tf32_only_where_torch_allows_it(device):
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed, precision in ((False, "ieee"), (True, "tf32")):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert launch.dot_precision() == precision
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


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
