"""Every derivative of every op is right or raises, naming the op: forward mode, second derivatives, torch.func."""

from __future__ import annotations

import pytest
import torch
from every_op import OPS, Op
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from util import assert_gradient_within_budget

import murf_fast as mf
from murf_fast.backends import native_problems
from murf_fast.ops._dense_attention import dense_attention

DIFFERENTIABLE = [op for op in OPS if op.differentiable]
# Called by modules alone (AnyUp, JAFAR, NAF); see there.
ELSEWHERE = {
    *("image_queries", "image_rectangle", "image_statistics"),
    *("naf_queries", "naf_rectangle", "naf_statistics"),
    *(["dense_attention"] if native_problems() else []),  # of the extension alone
}


def by_name(ops) -> dict:
    return {"argvalues": ops, "ids": [op.name for op in ops]}


def as_function(op: Op, tensors: dict[str, Tensor], backend: str | None = None):
    """The op as a function of its variables, and these."""
    names = op.variables(tensors)

    def function(*values: Tensor) -> Tensor:
        return op.call(tensors | dict(zip(names, values, strict=True)), backend=backend)

    return function, tuple(tensors[name] for name in names)


def widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def directions(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(v.shape, generator=generator).to(v.dtype) for v in values)


def difference(function, values, tangents, step: float) -> Tensor:
    plus, minus = ([v + s * t for v, t in zip(values, tangents, strict=True)] for s in (step, -step))
    return (function(*plus).double() - function(*minus).double()) / (2 * step)


LABELS = ("upsample_argmax", "upsample_confusion", "window_attention_argmax", "k_center_greedy")


@pytest.mark.parametrize("op", **by_name([op for op in OPS if op.name not in LABELS]))
def test_forward_mode_is_right_or_raises(op):
    """All variables move at once; then each of them alone, which must not be dropped."""
    tensors = op.tensors()
    function, values = as_function(op, tensors)
    oracle, wide = as_function(op, widened(tensors))
    reference, _ = as_function(op, tensors, "reference")
    alone = [tuple(t if i == j else t * 0 for i, t in enumerate(directions(values))) for j in range(len(values))]
    for tangents in (directions(values), *alone):
        duals, error = attempt(lambda: torch.func.jvp(function, values, tangents))  # noqa: B023
        if error is not None:
            assert "murf_fast." in str(error)
            assert not op.linear
            continue
        expected = difference(oracle, wide, [t.double() for t in tangents], 1e-5)
        same_dtype = torch.func.jvp(reference, values, tangents)[1]
        assert float(expected.norm()) > 0
        assert_gradient_within_budget(duals[1], expected, same_dtype + 1e-6 * expected.abs().max(), op.name)


@pytest.mark.parametrize("op", **by_name(DIFFERENTIABLE))
def test_second_derivatives_are_right(op):
    """Of a gradient penalty, which is what they are wanted for."""

    def penalty(function, values) -> tuple[Tensor, ...]:
        leaves = [v.detach().requires_grad_() for v in values]
        gradients = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)

    tensors = op.tensors()
    oracle = penalty(*as_function(op, widened(tensors)))
    same_dtype = penalty(*as_function(op, tensors, "reference"))
    actual = penalty(*as_function(op, tensors))
    for name, a, o, s in zip(op.variables(tensors), actual, oracle, same_dtype, strict=True):
        # First derivatives by kernels and by the reference round differently, and their difference goes on.
        assert_gradient_within_budget(a, o, s + 1e-5 * o.abs().max(), f"{op}: {name}")


@pytest.mark.parametrize("op", **by_name(DIFFERENTIABLE))
def test_torch_func_gives_the_gradients_of_autograd(op):
    function, values = as_function(op, op.tensors())
    leaves = [v.detach().requires_grad_() for v in values]
    expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    everything = tuple(range(len(values)))
    actual = torch.func.grad(lambda *v: function(*v).square().sum(), everything)(*values)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    several = tuple(torch.stack([v, 2 * v]) for v in values)
    per_sample = torch.vmap(torch.func.grad(lambda *v: function(*v).square().sum(), everything))(*several)
    for a, e in zip(per_sample, expected, strict=True):
        torch.testing.assert_close(a[0], e, rtol=1e-4, atol=1e-5 * float(e.abs().max()) + 1e-6)


def test_nested_transforms():
    """Every order of forward and reverse gives the Hessian."""
    rows = torch.randn(4, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        maps = mf.resize(x.view(1, 1, 2, 2).float(), (3, 5)).to(x.dtype)
        return maps.pow(3).sum()

    expected = torch.autograd.functional.hessian(
        lambda x: torch.nn.functional.interpolate(x.view(1, 1, 2, 2), (3, 5), mode="bilinear").pow(3).sum(), rows
    )
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        for inner in (torch.func.jacfwd, torch.func.jacrev):
            torch.testing.assert_close(outer(inner(loss))(rows), expected, rtol=1e-5, atol=1e-5)


def test_compiled_graphs_carry_tangents():
    x, t = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)

    def dual(x: Tensor, t: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(mf.resize(forward_ad.make_dual(x, t), (5, 7))).tangent

    def transform(x: Tensor, t: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: mf.resize(x, (5, 7)), (x,), (t,))[1]

    for function in (dual, transform):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, t), mf.resize(t, (5, 7)))


def attempt(call):
    """What a call gives, and the error it raises."""
    try:
        return call(), None
    except (RuntimeError, ValueError) as error:
        return None, error


class Recorder(TorchDispatchMode):
    """Calls of this library's registered ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "murf_fast":
            self.calls.setdefault(function._opname, (function, args))
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def calls() -> dict:
    """A call of every registered op, with its arguments, as the public ops and their derivatives make it."""
    recorder = Recorder()
    for op in OPS:
        tensors = op.tensors()
        names = op.variables(tensors) if op.differentiable else []
        with recorder:
            op.call({n: t.detach().clone() for n, t in tensors.items()})
            if names:
                leaves = {n: t.detach().clone().requires_grad_(n in names) for n, t in tensors.items()}
                result = op.call(leaves)
                torch.autograd.grad(result, [leaves[n] for n in names], torch.ones_like(result))
    x = torch.randn(1, 3, 4, 5)
    with recorder, torch.no_grad():
        mf.upsample_sum([x], (7, 8), out=torch.empty(1, 3, 7, 8))
        mf.upsample_concat([x], (7, 8), out=torch.empty(1, 3, 7, 8))
        mf.linear_head([x], torch.randn(2, 3), size=(7, 8), norm=torch.nn.BatchNorm2d(3))
        if not native_problems():
            mf.nearest_distance(torch.randn(4, 5), mf.NearestIndex(torch.randn(40, 5), cells=3))
            dense_attention(*torch.randn(3, 1, 6, 2, 8), scale=0.5)
    return recorder.calls


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {n.removeprefix("murf_fast::") for n in names if n.startswith("murf_fast::")}


def test_the_calls_are_of_every_registered_op(calls):
    assert set(calls) == registered() - ELSEWHERE


def floating_positions(args) -> list[int]:
    tensors = [a[0] if isinstance(a, (list, tuple)) and len(a) else a for a in args]
    return [i for i, t in enumerate(tensors) if isinstance(t, Tensor) and t.is_floating_point()]


def replaced(args, position: int, change):
    args = list(args)
    value = args[position]
    args[position] = [change(v) for v in value] if isinstance(value, (list, tuple)) else change(value)
    return args


def outputs(result) -> list[Tensor]:
    return [] if result is None else [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("name", sorted(registered() - ELSEWHERE))
def test_registered_ops_keep_tangents_or_raise(calls, name):
    op, args = calls[name]
    for position in floating_positions(args):
        with forward_ad.dual_level():
            duals = replaced(args, position, lambda x: forward_ad.make_dual(x.contiguous(), torch.ones(x.shape)))
            results, error = attempt(lambda: [forward_ad.unpack_dual(r).tangent for r in outputs(op(*duals))])  # noqa: B023
        if error is not None:
            assert f"murf_fast.{name}:" in str(error)
            continue
        # What has a forward mode is linear in each argument: differences are exact.
        plus, minus = (
            outputs(op(*replaced(args, position, lambda x, s=s: x + s * torch.ones_like(x)))) for s in (1, -1)
        )
        for tangent, p, m in zip(results, plus, minus, strict=True):
            torch.testing.assert_close(tangent, (p - m) / 2, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(registered() - ELSEWHERE))
def test_registered_ops_give_gradients_or_raise(calls, name):
    """A gradient that is not there is an error, not a None."""
    op, args = calls[name]
    for position in floating_positions(args):
        args_ = replaced(args, position, lambda x: x.detach().clone().requires_grad_())
        leaves = args_[position] if isinstance(args_[position], list) else [args_[position]]

        def gradients() -> None:
            results = [r for r in outputs(op(*args_)) if r.is_floating_point() and r.requires_grad]  # noqa: B023
            if results:  # else labels or indices
                torch.autograd.grad(sum(r.sum() for r in results), leaves)  # noqa: B023

        _, error = attempt(gradients)
        assert error is None or f"murf_fast.{name}:" in str(error), error


def test_what_has_no_derivative_says_so():
    x = torch.randn(1, 3, 4, 5)
    calls = {
        "upsample_argmax": lambda x: mf.upsample_argmax([x], (7, 8), return_values=True)[1],
        "nearest_distance": lambda x: mf.nearest_distance(x[0, 0], torch.randn(4, 5))[0],
        "k_center_greedy": lambda x: mf.k_center_greedy(x[0, 0], count=2),
        "upsample_sum": lambda x: mf.upsample_sum([x], (7, 8), out=torch.empty(1, 3, 7, 8)),
        "NearestIndex": lambda x: mf.NearestIndex(x[0, 0]),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match="murf_fast"):
            call(x.clone().requires_grad_())
        with forward_ad.dual_level(), pytest.raises(ValueError, match="murf_fast"):
            call(forward_ad.make_dual(x, x))
        assert name
