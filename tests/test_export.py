"""Graphs of ``torch.export``: any batch and sizes, and a backend that is chosen where they run."""

from __future__ import annotations

import contextlib
import functools

import every_op
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from util import assert_within_budget

import murf_fast
from murf_fast import backends
from murf_fast.backends import BackendUnavailableError

pytestmark = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting") or bool(backends.native_problems()),
    reason="needs torch 2.7 and the C++ extension",
)

# Of these some of a call's sizes are those of its example: rows of a table, of biases, and what leaves five to choose.
FIXED = ("k_center_greedy", "window_attention", "window_attention_argmax", "resample_pos_embed")


class Call(nn.Module):
    """An op as a module of its tensors."""

    def __init__(self, op: every_op.Op, names: list[str]) -> None:
        super().__init__()
        self.op, self.names = op, names

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.op.call(dict(zip(self.names, tensors, strict=True)))


@functools.cache
def exported(op: every_op.Op):
    """With every size open. Of a bias (B, C) a batch of C entries is an open question: there are 3 channels."""
    tensors = op.tensors(6, batch=11)
    open_ = tuple(dict.fromkeys(range(t.ndim), Dim.AUTO) for t in tensors.values())
    with torch.no_grad():
        return export(Call(op, list(tensors)), tuple(tensors.values()), dynamic_shapes=(open_,))


def ours(program) -> list[torch.fx.Node]:
    """Nodes of this library, in the regions under an autocast, too."""
    return [
        node
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if "murf_fast" in str(node.target)
    ]


@pytest.mark.parametrize("op", every_op.OPS, ids=str)
def test_ops_export_with_open_batch_and_sizes(op):
    nodes, run = ours(exported(op)), exported(op).module()
    assert nodes, "traced through"
    assert {node.args[-1] for node in nodes} == {"auto"}
    for n, batch in ((6, 11), (6, 5), (9, 5)):
        if n == 6 or op.name not in FIXED:
            tensors = op.tensors(n, batch=batch, seed=1)
            with torch.no_grad():
                assert torch.equal(run(*tensors.values()), op.call(tensors)), (n, batch)


@contextlib.contextmanager
def without_extension(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(backends, "native_problems", lambda: ["it is not there"])
        backends._warn_once.cache_clear()
        with pytest.warns(RuntimeWarning, match="falling back to the slow reference"):
            yield
        backends._warn_once.cache_clear()


@pytest.mark.parametrize("op", every_op.OPS, ids=str)
def test_graphs_run_where_the_extension_is_missing(op, monkeypatch):
    """By the reference, whose results lie as the kernels': compilers read what the graph says of strides."""
    tensors, run = op.tensors(6, batch=11), exported(op).module()
    # Not the layout of the example, which is the result's.
    maps = {k: t for k, t in tensors.items() if t.ndim == 4}
    tensors |= {k: t.contiguous(memory_format=torch.channels_last) for k, t in maps.items()}
    with torch.no_grad():
        double = {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}
        oracle = op.call(double, backend="reference")
        same_dtype = op.call(tensors, backend="reference")
        by_kernels = run(*tensors.values())
        with without_extension(monkeypatch):
            result = run(*tensors.values())
    assert (result.dtype, result.stride()) == (by_kernels.dtype, by_kernels.stride())
    if result.is_floating_point():
        assert_within_budget(result, oracle, same_dtype)
    else:
        assert torch.equal(result, same_dtype)


def test_gradients_go_through_a_graph_by_either_backend(monkeypatch):
    op = next(op for op in every_op.OPS if op.name == "upsample_concat")
    tensors, run = op.tensors(5, batch=3), exported(op).module()

    def gradients(call):
        leaves = {k: t.clone().requires_grad_() for k, t in tensors.items()}
        return torch.autograd.grad(call(leaves).square().sum(), list(leaves.values()))

    expected = gradients(op.call)
    assert all(torch.equal(g, e) for g, e in zip(gradients(lambda t: run(*t.values())), expected, strict=True))
    with without_extension(monkeypatch):
        found = gradients(lambda t: run(*t.values()))
    for gradient, wanted in zip(found, gradients(lambda t: op.call(t, backend="reference")), strict=True):
        assert torch.equal(gradient, wanted)


def test_a_backend_that_was_asked_for_stays():
    op = next(op for op in every_op.OPS if op.name == "resize")
    with murf_fast.use_backend("native"):
        assert {n.args[-1] for n in ours(exported.__wrapped__(op))} == {"native"}
    with murf_fast.use_backend("reference"):
        assert ours(exported.__wrapped__(op)) == []


def test_an_op_that_writes():
    class Into(nn.Module):
        def forward(self, a: Tensor, out: Tensor) -> Tensor:
            return murf_fast.upsample_concat([a, a], tuple(out.shape[2:]), out=out)

    a, out = torch.randn(2, 3, 4, 5), torch.empty(2, 6, 9, 8)
    with torch.no_grad():
        run = export(Into(), (a, out)).module()
        expected = murf_fast.upsample_concat([a, a], (9, 8))
        for name in ("native", "reference"):
            with murf_fast.use_backend(name):
                out.fill_(torch.nan)
                version = out._version
                run(a, out)
                assert torch.allclose(out, expected, atol=1e-6)
                assert out._version > version


def test_what_a_graph_cannot_hold_says_so():
    class Index(nn.Module):
        def forward(self, query: Tensor, bank: Tensor) -> Tensor:
            return murf_fast.nearest_distance(query, murf_fast.NearestIndex(bank))[0]

    with pytest.raises(ValueError, match="cannot be made within an export"):
        export(Index(), (torch.randn(3, 4), torch.randn(5, 4)))

    class Windows(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            size = tuple(q.shape[2:])
            windows = murf_fast.windows.neighborhood(size, size, (size[0] // 2, 3))
            return murf_fast.window_attention(q, q, q, windows=windows, num_heads=1)

    with pytest.raises(ValueError, match="`kernel_size` must be known when a graph is exported"):
        export(Windows(), (torch.randn(1, 4, 8, 8),), dynamic_shapes=({2: Dim.AUTO, 3: Dim.AUTO},))


def test_kernels_without_a_reference_are_asked_for_by_name(monkeypatch):
    grad = torch.randn(1, 2, 6, 6)
    arguments = (grad, [3, 3], "bilinear", False, None, None, False)
    assert torch.equal(
        torch.ops.murf_fast.resize_adjoint(*arguments, "auto"), torch.ops.murf_fast.resize_adjoint(*arguments, "native")
    )
    monkeypatch.setattr(backends, "native_problems", lambda: ["it is not there"])
    backends._warn_once.cache_clear()
    with (
        pytest.raises(BackendUnavailableError, match=r"resize_adjoint: .* backend 'native': it is not there"),
        pytest.warns(RuntimeWarning, match="falling back"),
    ):
        torch.ops.murf_fast.resize_adjoint(*arguments, "auto")
