"""What a GPU is asked first: every op in float32 and bfloat16, in two layouts, with gradients, and in a CUDA graph.

The other tests ask more of each kernel and take a quarter of an hour to compile. Without a GPU these run in the
interpreter, smaller; with `test_pixel_linear.py` and `test_moments.py`, parts of which are marked too, they launch
every kernel that there is.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import offline
import pytest
import test_pixel_linear
import torch
from every_op import OPS, Op, Tensors
from suite import HAS_GPU
from torch import Tensor
from util import assert_gradient_within_budget, assert_within_budget, layouts, nudged, worst

import murf_fast

pytestmark = pytest.mark.gpu_quick

# The interpreter has no bfloat16 arithmetic.
DTYPES = (torch.float32, torch.bfloat16) if HAS_GPU else (torch.float32,)
LAYOUTS = ("channels_last", "sliced") if HAS_GPU else ("sliced",)
SIDE, BATCH = (9, 2) if HAS_GPU else (2, 1)
# The host looks at what they found: how many centers a pool gives; what must be refused, and what bounds do not prove.
WAITS = ("k_center_greedy", "nearest_distance", "nearest_distance[cells]")

# Sums of more rows than a kernel keeps.
MANY_TAPS = Op(
    "resize[area]",
    lambda n, b: {"x": torch.randn(b, 3, 6 * n, 6 * n + 1)},
    lambda t, **k: murf_fast.resize(t["x"], (t["x"].shape[2] // 6, 2), mode="area", **k),
    ("x",),
    linear=True,
)
# Gradients of all heads in one program, which a bias has no room for.
UNBIASED = Op(
    "window_attention[no bias]",
    lambda n, b: {"q": torch.randn(b, 4, n, n + 1), "k": torch.randn(b, 4, 3, 2), "v": torch.randn(b, 6, 3, 2)},
    lambda t, **k: murf_fast.window_attention(*t.values(), windows=murf_fast.windows.full(), num_heads=2, **k),
    ("q", "k", "v"),
)
# More keys than a tile's 64, whose weights go through memory.
MANY_KEYS = Op(
    "window_attention[many keys]",
    lambda n, b: {"q": torch.randn(b, 4, n, n + 1), "k": torch.randn(b, 4, 9, 8), "v": torch.randn(b, 6, 9, 8)},
    lambda t, **k: murf_fast.window_attention(*t.values(), windows=murf_fast.windows.full(), num_heads=2, **k),
    ("q", "k", "v"),
)
MANY_KEYS_ARGMAX = Op(
    "window_attention_argmax[many keys]",
    MANY_KEYS.make,
    lambda t, **k: murf_fast.window_attention_argmax(*t.values(), windows=murf_fast.windows.full(), num_heads=2, **k),
    ("q", "k", "v"),
    differentiable=False,
)


def in_cells(t: Tensors, backend: str | None = None) -> Tensor:
    # Cells are made of what a search finds, which is nothing where launches are only noted.
    with mock.patch.object(
        murf_fast.NearestIndex, "_nearest", lambda _, q, c: torch.cdist(q, c).topk(1, largest=False)
    ):
        index = murf_fast.NearestIndex(t["bank"], cells=3, precision="float32", backend=backend)
    return murf_fast.nearest_distance(t["query"], index)[0]


# As many queries as it takes for cells to be chosen.
CELLS = Op(
    "nearest_distance[cells]",
    lambda n, b: {"query": torch.randn(256, 3), "bank": torch.randn(70, 3)},
    in_cells,
    ("query",),
    ("bank",),
    differentiable=False,
)
QUICK = (*OPS, MANY_TAPS, UNBIASED, MANY_KEYS, MANY_KEYS_ARGMAX, CELLS)

over_ops = pytest.mark.parametrize("op", QUICK, ids=str)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
over_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def tensors_of(op: Op, dtype: torch.dtype, layout: str, device: str) -> Tensors:
    side = max(SIDE, 3) if op.name == "neighborhood_attention" else SIDE  # its window fits no smaller map
    tensors = of_dtype(op.tensors(side, BATCH), dtype)
    maps = {n: layouts(t)[layout] for n, t in tensors.items() if t.ndim == 4 and (n in op.main or n in op.large)}
    return {n: t.to(device) for n, t in (tensors | maps).items()}


def of_dtype(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}


def nudges(tensors: Tensors) -> list[Tensors]:
    """The same tensors and others within their roundings: one run of the reference may be right by chance."""
    others = [
        {n: nudged(t.cpu(), seed).to(t.device) if t.is_floating_point() else t for n, t in tensors.items()}
        for seed in range(9)
    ]
    return [tensors, *others]


def gradients(op: Op, tensors: Tensors, backend: str | None, seed: int | None = None) -> dict[str, Tensor]:
    """``seed``: of the roundings in which the result's gradients differ."""
    leaves = {n: tensors[n].detach().requires_grad_() for n in op.variables(tensors)}
    result = op.call(tensors | leaves, backend=backend)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    if seed is not None:
        direction = nudged(direction, seed)
    direction = direction.to(result.device)
    found = torch.autograd.grad(result, list(leaves.values()), direction, allow_unused=True)
    return {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, found, strict=True)}


@over_ops
@over_dtypes
@over_layouts
def test_parity(op, dtype, layout, device):
    tensors = tensors_of(op, dtype, layout, device)
    actual = op.call(tensors, backend="triton")
    oracle = op.call(of_dtype(tensors, torch.float64), backend="reference")
    if not actual.is_floating_point():  # labels and indices; no two are as good for these tensors
        assert torch.equal(actual, oracle)
        return
    same = worst([op.call(t, backend="reference") for t in nudges(tensors)], oracle)
    assert_within_budget(actual, oracle, same, str(op))


@pytest.mark.parametrize("op", [op for op in QUICK if op.differentiable], ids=str)
@over_dtypes
@over_layouts
def test_gradients(op, dtype, layout, device):
    tensors = tensors_of(op, dtype, layout, device)
    actual = gradients(op, tensors, "triton")
    oracle = gradients(op, of_dtype(tensors, torch.float64), "reference")
    theirs = [gradients(op, t, "reference", seed or None) for seed, t in enumerate(nudges(tensors))]
    for name, gradient in actual.items():
        same = worst([t[name] for t in theirs], oracle[name])
        assert_gradient_within_budget(gradient, oracle[name], same, f"{op}: gradient of {name}")


@pytest.mark.parametrize("op", [op for op in QUICK if op.name not in WAITS], ids=str)
@over_dtypes
def test_graph(op, dtype, gpu):
    """A captured call computes anew what lies in its inputs when it is replayed."""
    tensors = tensors_of(op, dtype, "channels_last", gpu)
    others = {n: -t if n in op.main else t.clone() for n, t in tensors.items()}
    with torch.no_grad():
        expected = op.call(others)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            op.call(tensors)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = op.call(tensors)
        for name, t in tensors.items():
            t.copy_(others[name])
        graph.replay()
    assert torch.equal(result, expected)


@pytest.mark.skipif(HAS_GPU, reason="asked of the interpreter")
def test_every_kernel_is_launched(monkeypatch, device):
    """Launches are noted and not done. The host may look at what they should have written, all of it ones, to refuse
    what has no norm or to search again; which kernels it launches must not depend on that."""
    from triton.runtime import interpreter

    from murf_fast.kernels import moments, pixel_linear_resident

    launched, allocate = set(), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: allocate(*shape, **options).fill_(1))
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *_, **__: launched.add(self.fn.__name__))
    for op in QUICK:
        tensors = tensors_of(op, torch.float32, "sliced", device)
        with contextlib.suppress(IndexError):  # of the rows that a selection has not made
            gradients(op, tensors, "triton") if op.differentiable else op.call(tensors, backend="triton")
    for parts in test_pixel_linear.LAYERS.values():
        test_pixel_linear.results(parts, (24, 7, 5), torch.float32, "triton", device)
    monkeypatch.setattr(pixel_linear_resident, "LEAST_TILES", 0)
    test_pixel_linear.results(test_pixel_linear.LAYERS["close"], (24, 7, 5), torch.float32, "triton", device)
    moments.group_norm(*(torch.ones(8, dtype=torch.float64) for _ in range(2)), 9, 4, None, None, 1e-5)
    assert launched == offline.launched_kernels()
