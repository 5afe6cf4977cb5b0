"""Products of an encoder's pass by packed weights: what is packed, what an MLP is seen to be, that nothing is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from util import assert_within_budget

from murf_fast import use_backend
from murf_fast.nn.vit import _products
from murf_fast.nn.vit._products import LEAST_ROWS, Products, seen
from murf_fast.nn.vit.families._layout import Product

pytestmark = [
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"),
    pytest.mark.usefixtures("packs"),
]


@pytest.fixture
def packs(monkeypatch):
    """Whatever the processor is faster with."""
    monkeypatch.setattr(_products, "_can_pack", lambda x: True)
    with torch.no_grad():
        yield


class Mlp(nn.Module):
    """As the vision transformers have it: dropout does nothing in evaluation."""

    def __init__(self, act=None, dim=24, hidden=40, bias=True) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias=bias), nn.Linear(hidden, dim, bias=bias)
        self.act, self.drop = nn.GELU() if act is None else act, nn.Dropout(0.5)
        self.eval()

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class WithResidual(Mlp):
    def forward(self, x):
        return super().forward(x) + x


class InPlace(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x).add_(1)))


class OfAnother(Mlp):
    def forward(self, x):
        self.act(self.fc1(x))
        return self.fc2(self.act(self.fc1(x)))


class Branching(Mlp):
    def forward(self, x):
        return super().forward(x) if x[0, 0] > -1e9 else x


class Skipping(Mlp):
    """The second product is not of what was activated."""

    def forward(self, x):
        hidden = self.fc1(x)
        self.act(hidden)
        return self.fc2(hidden)


class Double(nn.Parameter):
    """A weight that says what an operation does."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result * 2 if func is F.linear else result


class Twice(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is F.gelu else result


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def rows(count=LEAST_ROWS, dim=24, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_mlp(dtype, bias, approximate):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this processor")
    x, module = rows().to(dtype), Mlp(nn.GELU(approximate), bias=bias)
    oracle = module.double()(x.double())
    module.to(dtype)
    parts = seen(module, x[:1])
    assert parts.approximate == approximate
    assert parts.first.weight is module.fc1.weight
    actual = Products(x).mlp(x, module)
    assert not torch.equal(actual, module(x)) or dtype == torch.float32  # one rounding less: it is another way
    assert_within_budget(actual, oracle, module(x))


@pytest.mark.parametrize(
    "module",
    [
        WithResidual(),
        InPlace(),
        OfAnother(),
        Skipping(),
        Branching(),
        Mlp(nn.SiLU()),
        Mlp(nn.Identity()),
        nn.utils.parametrizations.weight_norm(Mlp().fc1),
        nn.Sequential(nn.Linear(24, 24), nn.GELU()),
    ],
    ids=lambda module: type(module).__name__,
)
def test_anything_else_is_called(module):
    x = rows()
    assert seen(module, x[:1]) is None
    assert torch.equal(Products(x).mlp(x, module), module(x))


def test_dropout_that_drops_is_called():
    module = Mlp().train()
    assert seen(module, rows(1)) is None


def test_linear():
    x, layer = rows(), nn.Linear(24, 56)
    oracle = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    for project in (layer, Product(layer.weight, layer.bias, layer)):
        assert_within_budget(Products(x).linear(x, project), oracle, layer(x))


class Adapter(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def test_every_block_has_its_own_mlp():
    x, products = rows(), Products(rows())
    for module in (Mlp(), Mlp(nn.GELU("tanh")), WithResidual()):
        products.next_block()
        torch.testing.assert_close(products.mlp(x, module), module(x))


def test_weights_that_say_what_an_operation_does_are_left_to_them():
    x, module = rows(), Mlp()
    module.fc2.weight = Double(module.fc2.weight.detach())
    assert Products(x).linear(x, module.fc2) is None
    torch.testing.assert_close(Products(x).mlp(x, module), module(x))


@pytest.mark.parametrize("project", [Adapter(24, 24), nn.Linear(24, 24, dtype=torch.float64), nn.Sequential()])
def test_what_is_no_plain_product_is_left_to_its_owner(project):
    x = rows()
    assert Products(x).linear(x, project) is None


def test_changed_weights_count_in_the_next_block():
    x, layer = rows(), nn.Linear(24, 56)
    products = Products(x)
    before = products.linear(x, layer)
    layer.weight.data = layer.weight.data * 2  # which no version counter tells
    layer.bias.mul_(2)
    products.next_block()
    assert torch.equal(products.linear(x, layer), before * 2)


def test_small_passes_pack_nothing():
    x, layer = rows(LEAST_ROWS - 1), nn.Linear(24, 56)
    assert Products(x).linear(x, layer) is None


class TestPacks:
    def test_not_under_another_backend_nor_autocast(self, monkeypatch):
        monkeypatch.undo()
        x = rows()
        with use_backend("reference"):
            assert not _products._can_pack(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not _products._can_pack(x)
        for mode in (Twice(), Watching()):
            with mode:
                assert not _products._can_pack(x)
        before = _products._can_pack(x)
        with torch.device("cpu"):  # which is a mode, and changes nothing here
            assert _products._can_pack(x) == before
        with torch.backends.mkldnn.flags(enabled=False):
            assert not _products._can_pack(x)
        assert not _products._can_pack(x.double())
