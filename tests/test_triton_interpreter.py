"""The Triton kernels against the float64 reference: on the GPU where there is one, else in Triton's interpreter.

The interpreter takes about half a millisecond per program, hence the small shapes; a GPU also gets the shared cases,
bfloat16 and results above 2^31 elements.
"""

from __future__ import annotations

import pytest
import torch
from suite import CONCAT_CASES, LAYOUTS, SUM_CASES, Case, make_maps
from util import assert_gradient_within_budget, assert_within_budget

pytest.importorskip("triton")

import murf_fast
from murf_fast import backends, kernels
from murf_fast.ops._library import axes_of_maps

HAS_GPU = torch.cuda.is_available()
DEVICE = pytest.param("cuda", marks=pytest.mark.gpu) if HAS_GPU else "cpu"
pytestmark = [
    pytest.mark.parametrize("device", [DEVICE]),
    pytest.mark.skipif(
        bool(backends.reasons_against("triton", "cuda" if HAS_GPU else "cpu")),
        reason="; ".join(backends.reasons_against("triton", "cuda" if HAS_GPU else "cpu")),
    ),
]
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")

# The interpreter computes half precision with NumPy, which has no bfloat16.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else []))
SMALL = (
    Case("up", ((5, 2, 3), (5, 3, 2)), (5, 7)),
    Case("seventeen", ((17, 2, 3),), (3, 5), batch=1),
    Case("bicubic_via", ((3, 3, 2),), (5, 7), mode="bicubic", via=(4, 5), batch=1),
    Case("area_down", ((3, 7, 8), (3, 5, 4)), (3, 3), mode="area", batch=1),
    Case("antialias", ((3, 7, 5),), (3, 2), antialias=True, batch=1),
    Case("nearest_down", ((2, 7, 5),), (3, 2), mode="nearest", batch=1),
    Case("one_pixel", ((1, 1, 1), (1, 3, 1)), (2, 3)),
)
CASES = (*SMALL, *SUM_CASES) if HAS_GPU else SMALL
REDUCED = (SMALL[0], SMALL[1], SMALL[3], *(SUM_CASES if HAS_GPU else ()))
# More classes than a chunk holds; the interpreter affords one pixel row of them.
MANY_CLASSES = Case("many_classes", ((131, 1, 2),), (1, 3), batch=1)


def concat(maps, case, backend):
    return murf_fast.upsample_concat(maps, case.size, **case.resize, backend=backend)


def total(maps, case, backend):
    bias = torch.linspace(-1, 1, maps[0].shape[1], dtype=maps[0].dtype, device=maps[0].device)
    return murf_fast.upsample_sum(maps, case.size, bias=bias, **case.resize, backend=backend)


def expectation(maps, case, backend, norm="softmax"):
    values = torch.linspace(1, 3, maps[0].shape[1], dtype=maps[0].dtype, device=maps[0].device)
    bias = torch.linspace(-1, 1, maps[0].shape[1], dtype=maps[0].dtype, device=maps[0].device)
    return murf_fast.upsample_expectation(maps, case.size, values, bias=bias, norm=norm, **case.resize, backend=backend)


def linear_expectation(maps, case, backend):
    return expectation(maps, case, backend, "linear")


def loss(maps, case, backend, weighted=False):
    first = maps[0]
    batch, classes = first.shape[:2]
    target = torch.arange(batch * case.size[0] * case.size[1]).reshape(batch, *case.size) * 7 % (classes + 1) - 1
    options = {}
    if weighted:
        weight = torch.linspace(0.5, 2, classes, dtype=first.dtype, device=first.device)
        bias = torch.linspace(-1, 1, batch * classes, dtype=first.dtype, device=first.device).reshape(batch, classes)
        options = {"weight": weight, "label_smoothing": 0.1, "bias": bias}
    return murf_fast.upsample_cross_entropy(
        maps, target.to(first.device), ignore_index=-1, reduction="none", **options, **case.resize, backend=backend
    )


def weighted_loss(maps, case, backend):
    return loss(maps, case, backend, weighted=True)


def check(call, case, dtype, layout, device):
    maps = [m.to(device) for m in make_maps(case, dtype, layout)]
    oracle = call([m.double() for m in maps], case, "reference")
    assert_within_budget(call(maps, case, "triton"), oracle, call(maps, case, "reference"), str(case))


def check_gradients(call, case, dtype, layout, device):
    maps = [m.to(device) for m in make_maps(case, dtype, layout)]
    shape = call(maps, case, "reference").shape
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)

    def gradients(maps, backend):
        leaves = [m.detach().requires_grad_() for m in maps]
        result = call(leaves, case, backend)
        return torch.autograd.grad(result, leaves, direction.to(result.dtype))

    oracle = gradients([m.double() for m in maps], "reference")
    for i, three in enumerate(zip(gradients(maps, "triton"), oracle, gradients(maps, "reference"), strict=True)):
        assert_gradient_within_budget(*three, f"{case}: gradient of map {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sum(case, layout, dtype, device):
    check(total, case, dtype, layout, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [SMALL[0], *(CONCAT_CASES if HAS_GPU else ())], ids=str)
def test_concat(case, layout, dtype, device):
    check(concat, case, dtype, layout, device)
    check_gradients(concat, case, dtype, layout, device)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_adjoint(case, layout, device):
    """Also transposed rows without taps, which downsampling by nearest leaves."""
    check_gradients(total, case, torch.float32, layout, device)


@pytest.mark.parametrize("call", [expectation, linear_expectation, loss, weighted_loss])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*REDUCED, MANY_CLASSES], ids=str)
def test_pixel_scalars(case, dtype, call, device):
    check(call, case, dtype, "channels_last", device)


@pytest.mark.parametrize("call", [expectation, linear_expectation, loss, weighted_loss])
@pytest.mark.parametrize("case", [Case("tiny", ((5, 2, 1), (5, 1, 2)), (3, 3), batch=1), MANY_CLASSES], ids=str)
def test_pixel_gradients(case, call, device):
    check_gradients(call, case, torch.float32, "channels_last", device)


@pytest.mark.parametrize("norm", ["softmax", "linear"])
def test_gradient_of_values(norm, device):
    maps = [m.to(device) for m in make_maps(SMALL[1])]

    def gradient(backend, dtype):
        values = torch.linspace(1, 3, 17, dtype=dtype, device=device).requires_grad_()
        x = [m.to(dtype) for m in maps]
        out = murf_fast.upsample_expectation(x, (3, 5), values, norm=norm, backend=backend)
        return torch.autograd.grad(out.square().sum(), values)[0]

    assert_gradient_within_budget(
        gradient("triton", torch.float32), gradient("reference", torch.float64), gradient("reference", torch.float32)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*REDUCED, MANY_CLASSES], ids=str)
def test_argmax(case, dtype, device):
    """The logit of the chosen class is as large as the largest, within the budget of a logit."""
    maps = [m.to(device) for m in make_maps(case, dtype)]
    logits = murf_fast.upsample_sum([m.double() for m in maps], case.size, **case.resize, backend="reference")
    labels, values = murf_fast.upsample_argmax(maps, case.size, **case.resize, return_values=True, backend="triton")
    same_dtype = murf_fast.upsample_sum(maps, case.size, **case.resize, backend="reference").amax(1)
    assert_within_budget(values, logits.amax(1), same_dtype, "values")
    chosen = logits.gather(1, labels.long()[:, None])[:, 0]
    assert_within_budget(chosen.to(dtype), logits.amax(1), same_dtype, "logits of the labels")


@pytest.mark.parametrize(("classes", "dtype"), [(3, torch.uint8), (131, torch.uint8), (300, torch.int16)])
def test_argmax_ties_nan_and_label_types(classes, dtype, device):
    row = torch.zeros(1, classes, 1, 4)
    row[0, 1, 0, 1] = row[0, -1, 0, 1] = 2
    row[0, -2:, 0, 2] = torch.nan
    row[0, 0, 0, 2] = torch.inf
    row[..., 3] = -torch.inf
    labels = murf_fast.upsample_argmax([row.to(device)], (1, 4), backend="triton")
    assert labels.dtype == dtype
    assert labels.flatten().tolist() == [0, 1, classes - 2, 0]
    assert labels.flatten().tolist() == row.argmax(1).flatten().tolist()


@pytest.mark.parametrize("weighted", [False, True])
def test_labels_out_of_range_give_nan(weighted, device):
    """CPU tensors are checked by the op; the kernel itself must neither read outside nor hide it."""
    maps = [m.to(device) for m in make_maps(Case("labels", ((3, 1, 2),), (1, 5), batch=1))]
    target = torch.tensor([[[0, 3, -1, 2**40, 2]]], device=device)
    weight = torch.ones(3, device=device) if weighted else None
    out, lse = torch.empty(1, 1, 5, device=device), torch.empty(1, 1, 5, device=device)
    axes = axes_of_maps(maps, (1, 5), "bilinear", False, None)
    kernels.upsample_cross_entropy(maps, axes, None, target, weight, -1, 0.0, out, lse)
    assert out.isnan().flatten().tolist() == [False, True, False, True, False]
    assert out[0, 0, 2] == 0


@needs_gpu
def test_more_than_2_31_elements(device):
    x = torch.randn(1, 1024, 3, 5, device=device, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    size = (1500, 1501)
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of GPU memory")
    out = murf_fast.upsample_sum([x], size, backend="triton")
    assert out.numel() > 2**31
    rows = murf_fast.reference.upsample_sum([x.double()[:, -8:]], size)[:, :, -4:]
    same = murf_fast.reference.upsample_sum([x[:, -8:]], size)[:, :, -4:]
    assert_within_budget(out[:, -8:, -4:], rows, same)


@needs_gpu
def test_graph_capture_and_other_stream(device):
    case = CONCAT_CASES[0]
    maps = [m.to(device) for m in make_maps(case)]
    expected = concat(maps, case, "triton")
    with torch.cuda.stream(torch.cuda.Stream()):
        other = concat(maps, case, "triton")
    torch.cuda.synchronize()
    assert torch.equal(other, expected)
    out, graph = torch.empty_like(expected), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        murf_fast.upsample_concat(maps, case.size, **case.resize, out=out, backend="triton")
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
