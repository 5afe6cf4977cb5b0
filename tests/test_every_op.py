"""What holds for every op: empty batches, lazy negations, graphs for varying sizes, versions of what is written."""

from __future__ import annotations

import pytest
import torch
from every_op import OPS
from torch import Tensor

import murf_fast as mf

BATCHED = [op for op in OPS if op.name not in ("k_center_greedy", "resample_pos_embed")]


def by_name(ops) -> dict:
    return {"argvalues": ops, "ids": [op.name for op in ops]}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", **by_name(BATCHED))
def test_an_empty_batch(op, dtype, backend):
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in op.tensors(batch=0).items()}
    with torch.no_grad():
        result = op.call(tensors, backend=backend)
    several = {n: t.to(dtype) if t.is_floating_point() else t for n, t in op.tensors(batch=2).items()}
    sums = ("upsample_confusion", "upsample_cross_entropy")
    assert result.numel() == 0 or (op.name in sums and not bool(result.any()))  # of nothing
    assert result.shape[1:] == op.call(several).shape[1:]
    if op.differentiable:
        names = op.variables(tensors)
        leaves = {n: tensors[n].requires_grad_() for n in names}
        gradients = torch.autograd.grad(op.call(tensors | leaves, backend=backend).sum(), list(leaves.values()))
        for name, gradient in zip(names, gradients, strict=True):
            assert gradient.shape == tensors[name].shape
            assert not bool(gradient.any()), name


def negated(x: Tensor) -> Tensor:
    """The same values, as a tensor whose negation is still to be done."""
    return torch._neg_view(-x) if x.is_floating_point() else x


def conjugated(x: Tensor) -> Tensor:
    """The same values, as a view of every second number and still to be negated."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag if x.dtype in (torch.float32, torch.float64) else x


@pytest.mark.parametrize("lazy", [negated, conjugated])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", **by_name(OPS))
def test_lazily_negated_tensors(op, dtype, lazy):
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in op.tensors().items()}
    views = {n: lazy(t) for n, t in tensors.items()}
    assert any(v.is_neg() for v in views.values())
    torch.testing.assert_close(op.call(views), op.call(tensors))


@pytest.mark.parametrize("lazy", [negated, conjugated])
def test_lazily_negated_tensors_beside_the_dispatcher(lazy):
    """A prepared index and a selection with progress read memory themselves."""
    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    for options in ({"precision": "bfloat16"}, {"precision": "float32"}, {"cosine": True}):
        plain, index = mf.NearestIndex(rows, **options), mf.NearestIndex(lazy(rows), **options)
        for a, e in zip(mf.nearest_distance(rows, index), mf.nearest_distance(rows, plain), strict=True):
            assert torch.equal(a, e)
    calls = []
    chosen = mf.k_center_greedy(lazy(rows), count=20, progress=lambda *numbers: calls.append(numbers))
    assert calls
    assert torch.equal(chosen, mf.k_center_greedy(rows, count=20))


def test_a_lazily_negated_out_is_refused():
    out = torch._neg_view(torch.zeros(1, 3, 7, 8))
    with pytest.raises(ValueError, match=r"murf_fast.upsample_sum: `out` must not be a lazy negation"):
        mf.upsample_sum([torch.randn(1, 3, 4, 5)], (7, 8), out=out)


@pytest.mark.parametrize("op", **by_name(OPS))
def test_one_graph_for_sizes_that_vary(op):
    torch.compiler.reset()
    compiled = torch.compile(lambda tensors: op.call(tensors), dynamic=True, fullgraph=True, backend="eager")
    for n in (4, 6):
        tensors = op.tensors(n)
        torch.testing.assert_close(compiled(tensors), op.call(tensors))


def out_calls() -> dict:
    x = torch.randn(1, 3, 4, 5)
    return {
        "upsample_concat": lambda out, **k: mf.upsample_concat([x], (7, 8), out=out, **k),
        "upsample_sum": lambda out, **k: mf.upsample_sum([x], (7, 8), out=out, **k),
        "upsample_mean": lambda out, **k: mf.upsample_mean([x, x], (7, 8), out=out, **k),
        "upsample_mean, half": lambda out, **k: mf.upsample_mean([x.half()], (7, 8), out=out, **k),
        "resize_out": lambda out, **k: torch.ops.murf_fast.resize_out(x, "area", False, None, None, out, "native"),
    }


@pytest.mark.parametrize(
    ("name", "backend", "compiler"),
    [
        *((name, "native", compiler) for name in out_calls() for compiler in (None, "aot_eager")),
        *((name, "reference", None) for name in out_calls()),
        ("upsample_sum", "native", "inductor"),
    ],
)
def test_who_saved_a_tensor_notices_that_it_was_written(name, backend, compiler):
    call = out_calls()[name]
    torch.compiler.reset()

    def write(out: Tensor) -> None:
        call(out, backend=backend)

    write = write if compiler is None else torch.compile(write, backend=compiler)
    out = torch.zeros(1, 3, 7, 8, dtype=torch.float16 if "half" in name else torch.float32)
    factor = torch.ones_like(out, requires_grad=True)
    product = factor * out
    with torch.no_grad():
        write(out)
    assert bool(out.any())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_every_op_that_writes_is_among_those():
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("murf_fast::")]
    ops = [getattr(torch.ops.murf_fast, n.removeprefix("murf_fast::")).default for n in names]
    writing = {op._opname for op in ops if any(a.alias_info and a.alias_info.is_write for a in op._schema.arguments)}
    assert writing == {"upsample_concat_out", "upsample_sum_out", "resize_out"}
