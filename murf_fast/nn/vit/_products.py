"""The products of a pass on a CPU: with weights that the matrix library (oneDNN) has packed, once per block and pass.

Nothing packed outlives its block, so nothing can be stale, and memory grows by the weights of one block. An MLP of two
products around a GELU, whatever its class, is run as two calls, GELU in the first: what it does is seen, not guessed.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from murf_fast import _extension, backends
from murf_fast.nn._signatures import is_plain_tensor
from murf_fast.nn.vit.families._layout import Product
from murf_fast.ops._derivatives import is_watched

# Rows of a pass from which on packing pays: about the time of 200 rows of a product, of which it saves a tenth or more.
LEAST_ROWS = 2048


class Mlp(NamedTuple):
    """``linear(gelu(linear(x, w1, b1), approximate), w2, b2)``."""

    first: Product
    approximate: str
    second: Product


class Products:
    """The products of one pass over ``x``."""

    def __init__(self, x: Tensor) -> None:
        self._packs = _can_pack(x) and x.shape[0] >= LEAST_ROWS
        self._dtype = x.dtype
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._mlps: list[Mlp | None] = []

    def next_block(self) -> None:
        self._kept.clear()
        self._mlps.clear()

    def linear(self, x: Tensor, project: Any) -> Tensor | None:
        """``project(x)`` by its packed weight; None if it has none."""
        if not self._packs or type(project) not in (nn.Linear, Product) or not self._takes(project):
            return None
        return self._product(x, project)

    def mlp(self, x: Tensor, module: nn.Module) -> Tensor:
        """``module(x)``, by its products if it is two around a GELU, which a look at its first row tells."""
        if not self._packs:
            return module(x)
        if not self._mlps:
            found = seen(module, x[:1])
            takes = found is not None and self._takes(found.first) and self._takes(found.second)
            self._mlps.append(found if takes else None)
        parts = self._mlps[0]
        if parts is None:
            return module(x)
        return self._product(self._product(x, parts.first, "gelu", parts.approximate), parts.second)

    def _product(self, x: Tensor, project: nn.Linear | Product, after: str = "none", kind: str = "") -> Tensor:
        # The weight is kept beside what was packed of it: a number of a freed one could be given to another.
        kept = self._kept.get(id(project.weight))
        if kept is None:
            packed = torch.ops.mkldnn._reorder_linear_weight(project.weight.detach(), len(x))
            kept = self._kept[id(project.weight)] = (project.weight, packed)
        return torch.ops.mkldnn._linear_pointwise(x, kept[1], project.bias, after, [], kind)

    def _takes(self, project: nn.Linear | Product) -> bool:
        tensors = (project.weight,) if project.bias is None else (project.weight, project.bias)
        return all(
            is_plain_tensor(t) and t.dtype == self._dtype and t.is_cpu and t.layout == torch.strided for t in tensors
        )


class _Calls(TorchFunctionMode):
    """All that is called on tensors while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # In evaluation dropout returns what it was given.
        if not (func is F.dropout and result is args[0]):
            self.made.append((func, args, kwargs or {}, result))
        return result


def seen(module: nn.Module, x: Tensor) -> Mlp | None:
    """What ``module(x)`` calls, if that is a product, a GELU and a product, and nothing else."""
    with _Calls() as calls:
        result = module(x)
    if [func for func, *_ in calls.made] != [F.linear, F.gelu, F.linear]:
        return None
    (_, args1, kwargs1, hidden), (_, args2, kwargs2, activated), (_, args3, kwargs3, last) = calls.made
    first, second = _linear_of(*args1, **kwargs1), _linear_of(*args3, **kwargs3)
    follows = first[0] is x and len(args2) == 1 and args2[0] is hidden and second[0] is activated and last is result
    return Mlp(first[1], kwargs2.get("approximate", "none"), second[1]) if follows else None


def _linear_of(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Product]:
    return input, Product(weight, bias, None)


def _can_pack(x: Tensor) -> bool:
    """Whether packed products are there and were measured to be faster: processors with matrix units for bfloat16."""
    if torch.compiler.is_compiling() or not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16) or is_watched():
        return False
    if torch.is_autocast_enabled("cpu") or not torch._C._get_mkldnn_enabled():
        return False
    if backends.resolve(None, "cpu", x.dtype) != "native":
        return False
    return _has_packed() and _extension.current_level() == "amx"


@functools.cache
def _has_packed() -> bool:
    """Of a build of torch with oneDNN; the names are those that torch's own compiler calls."""
    names = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
