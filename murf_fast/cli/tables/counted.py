"""Operations and peak memory of plain PyTorch, counted on tensors without memory.

So a table knows what a case will take before it is run, at sizes that would not fit.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from murf_fast.cli.tables.case import Work


def counted(function: Callable[..., Any], *inputs: Tensor | nn.Module) -> Work:
    """Floating-point operations of the products (two for a multiplication with its addition), and the most bytes that
    lie in tensors at once, the inputs not among them, of ``function(*inputs)`` with inputs like these.

    Element-wise work, softmax and interpolation are no products, and are not counted.
    """
    moved = [copy.deepcopy(x).to("meta") if isinstance(x, nn.Module) else _like(x) for x in inputs]
    live = _Live()
    with FlopCounterMode(display=False) as counter, live:
        function(*moved)
    return Work(float(counter.get_total_flops()), float(live.peak))


def _like(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta").requires_grad_(x.requires_grad)


class _Live(TorchDispatchMode):
    """Adds the bytes of storages as operations make them, and takes them off as they go."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and id(t.untyped_storage()) not in before | self._known:
                self._add(t.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
