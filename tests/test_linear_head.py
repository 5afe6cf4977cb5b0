from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from suite import (
    CONCAT_CASES,
    DTYPES,
    LAYOUTS,
    Case,
    by_name,
    check_deterministic_across_threads,
    check_opcheck,
    make_maps,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from util import assert_gradient_within_budget, assert_within_budget

import murf_fast
from murf_fast import reference
from murf_fast.ops.linear_head import low_resolution_logits
from murf_fast.tables.resize import axis

CLASSES = 13
CASES = [c for c in CONCAT_CASES if c.name != "empty_batch"]
DIFFERENT = CONCAT_CASES[0]
VIA = Case("via_largest", ((5, 7, 6), (16, 3, 4), (6, 7, 6)), (23, 17), via=(7, 6))


@dataclass
class Head:
    """Everything a linear head has besides the maps, in one dtype."""

    weight: Tensor
    bias: Tensor | None
    cls: list[Tensor | None] | None
    norm: nn.Module | None

    def to(self, dtype: torch.dtype) -> Head:
        """The same numbers; a norm stays float32 (or becomes float64), as modules beside half maps do."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return Head(
            self.weight.detach().to(dtype),
            None if self.bias is None else self.bias.detach().to(dtype),
            None if self.cls is None else [None if t is None else t.detach().to(dtype) for t in self.cls],
            None if self.norm is None else copy.deepcopy(self.norm).to(wide),
        )

    def leaves(self) -> list[Tensor]:
        tensors = [self.weight, self.bias, *(self.cls or [])]
        if self.norm is not None:
            tensors += [self.norm.weight, self.norm.bias]
        return [t.requires_grad_() for t in tensors if t is not None]

    def __call__(self, maps: list[Tensor], case: Case, backend: str | None) -> Tensor:
        return murf_fast.linear_head(
            maps, self.weight, self.bias, size=case.size, norm=self.norm, cls=self.cls, **case.resize, backend=backend
        )


def make_head(case: Case, norm: str | None = None, cls: bool = True, bias: bool = True, make=nn.BatchNorm2d) -> Head:
    """Every second map gets CLS tokens."""
    generator = torch.Generator().manual_seed(7)
    widths = [3 + i if cls and i % 2 == 0 else 0 for i in range(len(case.maps))]
    columns = sum(m[0] for m in case.maps) + sum(widths)
    tokens = [torch.randn(case.batch, n, generator=generator) if n else None for n in widths]
    module = None
    if norm is not None:
        module = make(columns).train(norm == "train")
        with torch.no_grad():
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.copy_(torch.randn(columns, generator=generator))
            module.running_var.copy_(torch.rand(columns, generator=generator) + 0.5)
    return Head(
        torch.randn(CLASSES, columns, 1, 1, generator=generator) / columns**0.5,
        torch.randn(CLASSES, generator=generator) if bias else None,
        tokens if cls else None,
        module,
    )


def check_parity(case: Case, head: Head, dtype: torch.dtype, layout: str) -> Tensor:
    maps = make_maps(case, dtype, layout)
    head = head.to(dtype)
    actual = head.to(dtype)(maps, case, None)
    # The oracle sees the rounded weights: what is tested is the arithmetic, not the storage.
    oracle = head.to(torch.float64)([m.double() for m in maps], case, "reference")
    assert_within_budget(actual, oracle, head.to(dtype)(maps, case, "reference"), str(case))
    assert actual.dtype == dtype
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [*CASES, VIA], ids=str)
def test_parity(case, layout, dtype):
    result = check_parity(case, make_head(case), dtype, layout)
    first = make_maps(case, dtype, layout)[0]
    if layout in ("channels_last", "tokens") and first.shape[1] > 1 and not first.is_contiguous():
        assert result.is_contiguous(memory_format=torch.channels_last)
    else:
        assert result.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["eval", "train"])
@pytest.mark.parametrize(
    "case", [*by_name(CASES, ("different_channels", "via", "bicubic_antialias", "down")), VIA], ids=str
)
def test_parity_with_norm(case, norm, layout, dtype):
    check_parity(case, make_head(case, norm), dtype, layout)


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [None, "eval", "train"])
def test_optional_parts(norm, bias, cls):
    check_parity(VIA, make_head(VIA, norm, cls, bias), torch.float32, "channels_last")


@given(
    maps=st.lists(st.tuples(*[st.integers(1, 20)] * 3), min_size=1, max_size=4),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    via=st.none() | st.tuples(st.integers(1, 25), st.integers(1, 25)),
    norm=st.sampled_from([None, "eval"]),
    layout=st.sampled_from(LAYOUTS),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(maps, size, via, norm, layout):
    case = Case("drawn", tuple(maps), size, via=via)
    check_parity(case, make_head(case, norm), torch.float32, layout)


def test_empty_batch():
    case = by_name(CONCAT_CASES, ("empty_batch",))[0]
    assert make_head(case, "eval")(make_maps(case), case, None).shape == (0, CLASSES, *case.size)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [None, "eval", "train"])
@pytest.mark.parametrize("case", [DIFFERENT, VIA], ids=str)
def test_gradients(case, norm, dtype, layout):
    """To the maps, weight, bias, CLS tokens and the norm's parameters, against those of the naive graph."""
    maps = make_maps(case, dtype, layout)
    head = make_head(case, norm).to(dtype)
    direction = torch.randn(case.batch, CLASSES, *case.size, generator=torch.Generator().manual_seed(3)).to(dtype)

    def gradients(dtype: torch.dtype, backend: str | None) -> tuple[Tensor, ...]:
        own = head.to(dtype)
        inputs = [m.detach().to(dtype).requires_grad_() for m in maps]
        leaves = [*inputs, *own.leaves()]
        return torch.autograd.grad(own(inputs, case, backend), leaves, direction.to(dtype))

    oracle, same_dtype, actual = (
        gradients(torch.float64, "reference"),
        gradients(dtype, "reference"),
        gradients(dtype, None),
    )
    for i, (a, o, s) in enumerate(zip(actual, oracle, same_dtype, strict=True)):
        assert a.dtype == s.dtype
        assert_gradient_within_budget(a, o, s, f"gradient {i}")


def test_gradcheck():
    """The naive graph's own gradients, in float64, with batch statistics."""
    case = Case("small", ((2, 3, 2), (1, 2, 2)), (4, 3), via=(3, 2))
    head = make_head(case, "train").to(torch.float64)
    maps = [m.double().requires_grad_() for m in make_maps(case)]
    leaves = head.leaves()
    assert torch.autograd.gradcheck(lambda *_: head(maps, case, "reference"), [*maps, *leaves])


def test_twice_differentiable():
    maps, head = make_maps(VIA), make_head(VIA, "train")

    def second(dtype: torch.dtype, backend: str | None) -> tuple[Tensor, ...]:
        own = head.to(dtype)
        inputs = [m.to(dtype).requires_grad_() for m in maps]
        leaves = [*inputs, *own.leaves()]
        first = torch.autograd.grad(own(inputs, VIA, backend).pow(2).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    oracle, same_dtype = second(torch.float64, "reference"), second(torch.float32, "reference")
    # A CLS token is a constant map: batch norm's gradients of its pixels cancel but for a thousandth, and the roundings
    # stay. They are as large as those of the maps' pixels.
    pixels = max(float(o.abs().sum((2, 3)).max()) for o in oracle[: len(maps)])
    tokens = {id(o) for o in oracle[len(maps) :] if o.shape[:1] == (VIA.batch,) and o.ndim == 2}
    assert tokens
    for a, o, s in zip(second(torch.float32, None), oracle, same_dtype, strict=True):
        if id(o) in tokens:
            assert_within_budget(a, o, s, "gradient of CLS", terms=pixels)
        else:
            assert_gradient_within_budget(a, o, s)


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [DIFFERENT, VIA, by_name(CASES, ("down",))[0]], ids=str)
def test_running_statistics(case, dtype, momentum):
    """Three steps of training, then evaluation with what was learnt, beside torch's own batch norm."""
    head = make_head(case, "train").to(dtype)
    head.norm.momentum = momentum
    oracle, same_dtype = head.to(torch.float64), head.to(dtype)
    for step in range(3):
        maps = [m * (step + 1) + step for m in make_maps(case, dtype)]
        head(maps, case, None)
        oracle([m.double() for m in maps], case, "reference")
        same_dtype(maps, case, "reference")
    assert head.norm.num_batches_tracked == oracle.norm.num_batches_tracked == 3
    for name in ("running_mean", "running_var"):
        a, o, s = (getattr(h.norm, name) for h in (head, oracle, same_dtype))
        assert_within_budget(a, o, s, name)


def test_statistics_belong_to_the_grid():
    """MuRF normalizes on the largest grid, before the logits go to the image: other statistics than the image's."""
    at_via, at_size = make_head(VIA, "train"), make_head(VIA, "train")
    at_via(make_maps(VIA), VIA, None)
    at_size(make_maps(VIA), Case("direct", VIA.maps, VIA.size), None)
    assert (at_via.norm.running_var - at_size.norm.running_var).abs().max() > 1e-3


def test_norm_without_running_statistics():
    def make(columns):
        return nn.BatchNorm2d(columns, affine=False, track_running_stats=False).eval()

    head = make_head(VIA)
    head.norm = make(head.weight.shape[1])
    check_parity(VIA, head, torch.float32, "channels_last")


def test_sync_batch_norm_of_one_process():
    check_parity(VIA, make_head(VIA, "train", make=nn.SyncBatchNorm), torch.float32, "channels_last")
    check_parity(VIA, make_head(VIA, "eval", make=nn.SyncBatchNorm), torch.float32, "channels_last")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["eval", "train"])
def test_large_mean(norm, dtype):
    """Channels far from zero, as DINOv2's massive ones."""
    head = make_head(DIFFERENT, norm, cls=False)
    maps = [m + 30 for m in make_maps(DIFFERENT, dtype)]
    head.norm.running_mean += 30
    head = head.to(dtype)
    oracle = head.to(torch.float64)([m.double() for m in maps], DIFFERENT, "reference")
    same_dtype = head.to(dtype)(maps, DIFFERENT, "reference")
    actual = head.to(dtype)(maps, DIFFERENT, None)
    if norm == "train" or dtype != torch.float32:
        assert_within_budget(actual, oracle, same_dtype)
        return
    # A folded norm sums first and subtracts then; rounding a sum of that size comes on top.
    scale = (head.norm.weight * torch.rsqrt(head.norm.running_var + head.norm.eps)).abs().double()
    summed = Head(head.weight.flatten(1).abs().double() * scale, None, None, None)
    magnitude = summed([m.abs().double() for m in maps], DIFFERENT, "reference")
    allowed = 2 * (same_dtype - oracle).abs().max() + torch.finfo(dtype).eps * magnitude
    assert ((actual - oracle).abs() <= allowed).all()


@pytest.mark.parametrize("norm", [None, "eval", "train"])
@pytest.mark.parametrize("layout", ["contiguous", "tokens"])
def test_autocast(layout, norm):
    maps, head = make_maps(VIA, layout=layout), make_head(VIA, norm)
    oracle = head.to(torch.float64)([m.double() for m in maps], VIA, "reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = head.to(torch.float32)(maps, VIA, None)
        same = head.to(torch.float32)(maps, VIA, "reference")
        assert actual.dtype == F.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype == torch.bfloat16
    assert_within_budget(actual, oracle, same)


def test_autocast_leaves_float64_alone():
    maps, head = [m.double() for m in make_maps(VIA)], make_head(VIA, "eval").to(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(maps, VIA, None).dtype == torch.float64


@pytest.mark.parametrize("norm", [None, "eval", "train"])
def test_compile(norm):
    head = make_head(VIA, norm)

    def everything(own: Head, dtype: torch.dtype, backend: str | None, compiled: bool = False) -> list[Tensor]:
        def function(maps: list[Tensor]) -> Tensor:
            return own([m * 2 for m in maps], VIA, backend) * 3

        maps = [m.to(dtype).requires_grad_() for m in make_maps(VIA)]
        leaves = [*maps, *own.leaves()]
        result = (torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function)(maps)
        direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        statistics = [] if norm is None else [own.norm.running_mean, own.norm.running_var, own.norm.num_batches_tracked]
        return [result, *torch.autograd.grad(result, leaves, direction), *statistics]

    torch.compiler.reset()
    actual = everything(head.to(torch.float32), torch.float32, None, compiled=True)
    oracle = everything(head.to(torch.float64), torch.float64, "reference")
    for a, o, e in zip(actual, oracle, everything(head.to(torch.float32), torch.float32, "reference"), strict=True):
        assert torch.equal(a, e) if not a.is_floating_point() else assert_gradient_within_budget(a, o, e) is None


def test_compile_with_inductor():
    maps, head = make_maps(VIA), make_head(VIA, "eval").to(torch.float32)
    oracle = head.to(torch.float64)([m.double() for m in maps], VIA, "reference")
    torch.compiler.reset()
    with torch.no_grad():
        actual = torch.compile(lambda: head(maps, VIA, None) * 2, fullgraph=True)()
    assert_within_budget(actual, 2 * oracle, 2 * head(maps, VIA, "reference"))


def test_compile_under_autocast():
    maps, head = make_maps(VIA), make_head(VIA, "eval")
    torch.compiler.reset()
    compiled = torch.compile(lambda: head(maps, VIA, None), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(), head(maps, VIA, None))


def test_meta():
    maps, head = [m.to("meta") for m in make_maps(VIA)], make_head(VIA)
    result = murf_fast.linear_head(
        maps, head.weight.to("meta"), size=VIA.size, cls=[None if t is None else t.to("meta") for t in head.cls]
    )
    assert result.is_meta
    assert result.shape == (2, CLASSES, *VIA.size)


def test_threads():
    head = make_head(VIA, "eval")
    check_deterministic_across_threads(head, VIA)


def test_maps_of_one_grid_are_added_first():
    head = make_head(VIA)
    maps, bias = low_resolution_logits(make_maps(VIA), head.weight, head.bias, grid=(7, 6), cls=head.cls)
    assert [tuple(m.shape) for m in maps] == [(2, CLASSES, 7, 6), (2, CLASSES, 3, 4)]
    result = murf_fast.upsample_sum(maps, VIA.size, bias=bias, via=VIA.via)
    assert torch.equal(result, head(make_maps(VIA), VIA, None))


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that an operation made, views apart."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {
            x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)
        }
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in inputs:
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens"])
def test_maps_are_read_in_place(layout):
    case = Case("wide", ((300, 9, 8), (200, 5, 6)), (20, 18))
    maps, head = make_maps(case, layout=layout), make_head(case, "eval")
    with LargestResult() as largest:
        result = head(maps, case, None)
    assert largest.elements == result.numel() < maps[0].numel()


# VmHWM and not ru_maxrss, which a process inherits from the one that started it.
PEAK = """
import torch, murf_fast
def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
def run(classes, size):
    maps = [torch.randn(1, 768, n, n).to(memory_format=torch.channels_last) for n in (18, 37, 55)]
    weight, norm = torch.randn(classes, 3 * 768), torch.nn.BatchNorm2d(3 * 768).eval()
    before = resident("VmRSS")
    result = murf_fast.linear_head(maps, weight, torch.zeros(classes), size=size, via=55, norm=norm)
    return resident("VmHWM") - before, result.numel() * result.element_size()
with torch.no_grad():
    run(150, 64)
    print(*run(150, 512))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc")
def test_peak_memory():
    output = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True).stdout
    peak, logits = map(int, output.split())
    assert peak <= 1.1 * logits


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "area", "nearest"])
@pytest.mark.parametrize("size", [(11, 13), (3, 4), (1, 1)])
def test_resize_gram(size, mode):
    x = torch.randn(2, 3, 7, 6)
    matrices = [axis(n, m, mode).dense() for n, m in zip((7, 6), size, strict=True)]
    gram_y, gram_x = (torch.from_numpy(u.T @ u) for u in matrices)
    expected = gram_y @ x.double() @ gram_x
    scale = float(expected.abs().max()) * np.finfo(np.float32).eps
    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=layout)
        actual = torch.ops.murf_fast.resize_gram(y, size, mode, False, "native")
        assert actual.is_contiguous(memory_format=layout)
        # At most sixteen products, each of them rounded.
        assert (actual - expected).abs().max() <= 16 * scale
    assert (reference.resize_gram(x.double(), size, mode) - expected).abs().max() <= 16 * scale


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens"])
def test_registration(layout):
    for needs_gradient in (False, True):
        x = make_maps(DIFFERENT, layout=layout)[0].requires_grad_(needs_gradient)
        check_opcheck(torch.ops.murf_fast.resize_gram.default, x, [11, 13], "bilinear", False, "native")


ONE = torch.ones(1, 2, 3, 4)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"features": []}, TypeError, "`features` must be a non-empty list"),
        ({"features": [ONE, ones(2, 2, 3, 4)]}, ValueError, r"`features\[1\]` must have the batch size"),
        ({"features": [ONE.int()]}, TypeError, "int32"),
        ({"size": (0, 4)}, ValueError, "`size` must be positive"),
        ({"via": (4, -1)}, ValueError, "`via` must be positive"),
        ({"mode": "lanczos"}, ValueError, "`mode` must be one of"),
        ({"memory_format": torch.channels_last_3d}, ValueError, "`memory_format`"),
        ({"weight": None}, TypeError, "`weight` must be a floating-point tensor, got NoneType"),
        ({"weight": torch.ones(5, 2, dtype=torch.int64)}, TypeError, "`weight` must be .*int64"),
        ({"weight": ones(5, 2, 3, 3)}, ValueError, r"`weight` must be \(K, D\) or .* got \(5, 2, 3, 3\)"),
        ({"weight": ones(5, 3)}, ValueError, "`weight` must have one column per channel .* 2 = 2, got 3"),
        ({"weight": ones(5, 2), "cls": [ones(1, 4)]}, ValueError, r"2 \+ 4 = 6, got 2"),
        ({"weight": ones(5, 2).half()}, TypeError, "`weight` must have the dtype of .*float32, got .*float16"),
        ({"weight": ones(5, 2).to("meta")}, ValueError, "`weight` must be on the device of .*cpu, got meta"),
        ({"bias": ones(4)}, ValueError, r"`bias` must have shape \(5,\), one entry per row of `weight`, got \(4,\)"),
        ({"bias": 1.0}, TypeError, "`bias` must be a floating-point tensor, got float"),
        ({"cls": [None, None]}, ValueError, "`cls` must have one entry per map, 1, got 2"),
        ({"cls": [7]}, TypeError, r"`cls\[0\]` must be a tensor or None, got int"),
        ({"cls": [ones(2, 4)]}, ValueError, r"`cls\[0\]` must have shape \(1, channels\), got \(2, 4\)"),
        ({"cls": [ones(1, 4).half()]}, TypeError, r"`cls\[0\]` must have the dtype"),
        ({"norm": nn.LayerNorm(2)}, TypeError, "`norm` must be a BatchNorm2d or SyncBatchNorm, got LayerNorm"),
        ({"norm": nn.BatchNorm2d(3)}, ValueError, "`norm` must have one feature per column of `weight`, 2, got 3"),
        ({"norm": nn.BatchNorm2d(2).to("meta")}, ValueError, "`norm` must be on the device"),
        ({"norm": nn.BatchNorm2d(2), "size": 1}, ValueError, "`norm` in training mode needs more than one value"),
        ({"backend": "cuda"}, ValueError, "`backend` must be one of"),
    ],
)
def test_bad_input(change, error, words):
    arguments: dict[str, object] = {"features": [ONE], "weight": ones(5, 2), "size": (5, 6), **change}
    with pytest.raises(error, match=words):
        murf_fast.linear_head(**arguments)


def test_bad_input_does_no_work():
    norm = nn.BatchNorm2d(2)
    with pytest.raises(ValueError, match="`bias`"):
        murf_fast.linear_head([ONE], ones(5, 2), ones(4), size=5, norm=norm)
    assert norm.num_batches_tracked == 0


def test_backend_that_is_not_there():
    with pytest.raises(murf_fast.BackendUnavailableError, match="float64 runs through the reference only"):
        murf_fast.linear_head([ONE.double()], ones(5, 2).double(), size=5, backend="native")
