"""A plain call passes by PyTorch's dispatcher (murf_fast/ops/_plain.py). Whatever the dispatcher is for is still there.

Every situation runs an op and asserts what the dispatcher makes of it. With a test of plainness that says yes to
everything, every one of them fails.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, dispatch_functionalize
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from util import assert_within_budget

import murf_fast
from murf_fast.backends import native_problems
from murf_fast.ops import _library, _plain

pytestmark = pytest.mark.skipif(bool(native_problems()), reason="needs the C++ extension")

Op = Callable[[Tensor], Tensor]


def resize(x: Tensor) -> Tensor:
    return murf_fast.resize(x, (5, 7))


def upsample_concat(x: Tensor) -> Tensor:
    """Of two maps, the second of which is the special one."""
    return murf_fast.upsample_concat([torch.ones(1, 1, 2, 2, dtype=x.dtype), x], (5, 7))


def draw() -> Tensor:
    return torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))


def reference(op: Op, x: Tensor) -> Tensor:
    with murf_fast.use_backend("reference"):
        return op(x)


def name_of(op: Op) -> str:
    return f"murf_fast.{op.__name__}.default"


def same(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a, b)


def within_budget(evaluate: Callable[[Op], Callable[[Tensor], Tensor]], op: Op) -> None:
    """``evaluate(op)`` of a drawn map, within the budget of the reference."""
    x, plain = draw(), evaluate(lambda x: reference(op, x))
    assert_within_budget(evaluate(op)(x), plain(x.double()), plain(x))


def gradient(op: Op) -> None:
    def evaluate(op: Op) -> Op:
        def gradient(x: Tensor) -> Tensor:
            x = x.requires_grad_()
            return torch.autograd.grad(op(x).square().sum(), x)[0]

        return gradient

    within_budget(evaluate, op)


def gradient_of_a_parameter(op: Op) -> None:
    assert op(torch.nn.Parameter(draw())).requires_grad


def dual_numbers(op: Op) -> None:
    with forward_ad.dual_level(), torch.no_grad():
        tangent = forward_ad.unpack_dual(op(forward_ad.make_dual(draw(), draw()))).tangent
    assert tangent is not None


def transform_grad(op: Op) -> None:
    within_budget(lambda op: torch.func.grad(lambda x: op(x).square().sum()), op)


def transform_jvp(op: Op) -> None:
    within_budget(lambda op: lambda x: torch.func.jvp(op, (x,), (x,))[1], op)


def transform_vmap(op: Op) -> None:
    x = torch.randn(3, 1, 2, 3, 4)
    with torch.no_grad():
        same(torch.func.vmap(op)(x), torch.stack([op(entry) for entry in x]))


def transform_functionalize(op: Op) -> None:
    assert name_of(op) in made_graph(torch.func.functionalize(op))


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def dispatch_mode(op: Op) -> None:
    with Seen() as seen:
        op(draw())
    assert name_of(op) in seen.names


class Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def function_mode(op: Op) -> None:
    with Called() as called:
        op(draw())
    assert name_of(op) in called.names


def fake_tensors(op: Op) -> None:
    with FakeTensorMode() as mode:
        x = mode.from_tensor(draw())
        assert isinstance(op(x), FakeTensor)


def fake_mode_over_real_tensors(op: Op) -> None:
    x = draw()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(op(x), FakeTensor)


def functional_tensors(op: Op) -> None:
    results = []

    def function(x: Tensor) -> Tensor:
        results.append(type(op(x)))
        return x

    with torch.no_grad():
        dispatch_functionalize(function)(draw())
    assert results == [FunctionalTensor]


class Logged(Tensor):
    """A subclass that is a tensor by itself, and notices what is called on it."""

    names: list[str] = []  # noqa: RUF012 (of the class, for all)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.names.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


def subclass_with_functions(op: Op) -> None:
    Logged.names.clear()
    op(draw().as_subclass(Logged))
    assert name_of(op) in Logged.names


class Wrapped(Tensor):
    """A subclass without memory of its own."""

    names: list[str] = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, inner: Tensor):
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.names.append(str(function))
        inner = torch.utils._pytree.tree_map(lambda a: a.inner if isinstance(a, cls) else a, args)
        return function(*inner, **(kwargs or {}))


def subclass_with_dispatch(op: Op) -> None:
    Wrapped.names.clear()
    same(op(Wrapped(draw())), op(draw()))
    assert name_of(op) in Wrapped.names


def negative_bit(op: Op) -> None:
    same(op(torch._neg_view(draw())), op(-draw()))


def meta(op: Op) -> None:
    x = draw().to("meta")
    result = murf_fast.resize(x, (5, 7)) if op is resize else murf_fast.upsample_concat([x, x], (5, 7))
    assert result.is_meta


def made_graph(function: Callable, **options) -> str:
    with torch.no_grad():
        return str(make_fx(function, **options)(draw()).graph)


def make_fx_real(op: Op) -> None:
    assert name_of(op) in made_graph(op)


def make_fx_symbolic(op: Op) -> None:
    assert name_of(op) in made_graph(op, tracing_mode="symbolic")


def make_fx_before_dispatch(op: Op) -> None:
    assert name_of(op) in made_graph(op, pre_dispatch=True)


def jit_trace(op: Op) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(op, (draw(),), check_trace=False)
    assert f"murf_fast::{op.__name__}" in str(traced.graph)


def compiled(op: Op) -> None:
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph

    torch.compiler.reset()
    with torch.no_grad():
        same(torch.compile(op, fullgraph=True, backend=backend)(draw()), op(draw()))
    assert f"murf_fast.{op.__name__}" in graphs[0]


def exported(op: Op, strict: bool) -> str:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return op(x)

    return str(torch.export.export(Module(), (draw(),), strict=strict).graph)


def exported_strictly(op: Op) -> None:
    assert name_of(op) in exported(op, strict=True)


def exported_by_running(op: Op) -> None:
    assert name_of(op) in exported(op, strict=False)


def profiler(op: Op) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        op(draw())
    assert f"murf_fast::{op.__name__}" in {event.name for event in profile.events()}


def legacy_profiler(op: Op) -> None:
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        op(draw())
    assert f"murf_fast::{op.__name__}" in {event.name for event in profile.function_events}


SITUATIONS = [
    gradient,
    gradient_of_a_parameter,
    dual_numbers,
    transform_grad,
    transform_jvp,
    transform_vmap,
    transform_functionalize,
    dispatch_mode,
    function_mode,
    fake_tensors,
    fake_mode_over_real_tensors,
    functional_tensors,
    subclass_with_functions,
    subclass_with_dispatch,
    negative_bit,
    meta,
    make_fx_real,
    make_fx_symbolic,
    make_fx_before_dispatch,
    jit_trace,
    compiled,
    exported_strictly,
    exported_by_running,
    profiler,
    legacy_profiler,
]
every_situation = pytest.mark.parametrize("situation", SITUATIONS, ids=lambda f: f.__name__)
every_op = pytest.mark.parametrize("op", [resize, upsample_concat], ids=lambda f: f.__name__)


@every_op
@every_situation
def test_the_op_is_seen(situation, op):
    situation(op)


@every_op
@every_situation
def test_a_wrong_test_of_plainness_is_noticed(situation, op, monkeypatch):
    monkeypatch.setattr(_library, "is_plain", lambda tensors: True)
    with pytest.raises(BaseException):  # noqa: B017, PT011 (an assertion, or torch's complaint)
        situation(op)


def plain_tensors() -> dict[str, list[Tensor]]:
    x = torch.randn(2, 4, 5, 6)
    with torch.inference_mode():
        made_in_inference = torch.randn(2, 4, 5, 6)
    return {
        "float32": [x],
        "half": [x.bfloat16(), x.half()],
        "views": [x[:, 1:], x.mT, x.to(memory_format=torch.channels_last), x[0, 0, 0].expand(2, 6)],
        "parameter": [torch.nn.Parameter(x, requires_grad=False)],
        "wants a gradient": [torch.nn.Parameter(x)],
        "made in inference mode": [made_in_inference, x],
        "none": [],
    }


@pytest.mark.parametrize("name", plain_tensors())
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_plain_calls(name, mode):
    found = []

    def look():
        with mode():
            found.append(_plain.is_plain(plain_tensors()[name]))

    look()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [True, True]


def test_plain_calls_pass_by_the_dispatcher(monkeypatch):
    """In both modes, and where gradients are wanted by nobody."""
    answers = []
    monkeypatch.setattr(_library, "is_plain", lambda tensors: answers.append(_plain.is_plain(tensors)) or answers[-1])
    resize(draw())
    with torch.no_grad():
        resize(draw().requires_grad_())
    with torch.inference_mode():
        assert resize(draw()).is_inference()
        upsample_concat(draw())
    assert answers == [True] * 4


def test_plain_on_a_gpu(gpu):
    assert _plain.is_plain([torch.ones(1, device=gpu), torch.ones(1, device=gpu).half()])


def test_another_torch(monkeypatch):
    """Without torch's private functions every call is the dispatcher's."""
    monkeypatch.delattr(torch._C, "_dispatch_tls_local_include_set")
    with pytest.raises(ImportError):
        _plain._made()
    assert not _plain._never([draw()])
