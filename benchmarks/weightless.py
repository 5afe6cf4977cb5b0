"""Calls that allocate but do not compute: what the host does around launches at full size, in seconds.

Operations of PyTorch on large tensors become tensors of zeros that no page of memory stands behind; small ones run, so
the tables that kernels walk are right.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

LARGE = 1 << 17  # elements; no table that decides how often a loop runs is as large
OWN = "murf_fast"


class Weightless(TorchDispatchMode):
    """While it is active, large results hold zeros. What depends on values (``nonzero``, ``item``) runs on those; that
    all of them are fine (``all``) is believed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[tuple, object] = {}

    def __torch_dispatch__(self, func: Callable, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == OWN:
            with self:  # for the operations within
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        large = any(x.numel() >= LARGE for x in tensors)
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
            return _written(func, args, kwargs) if large else func(*args, **kwargs)
        if aliases:  # views
            return func(*args, **kwargs)
        try:
            outlines = self._outlines_of(func, args, kwargs)
        except (NotImplementedError, RuntimeError):  # the shape depends on values
            return func(*args, **kwargs)
        if not large and all(x.numel() < LARGE for x in tree_leaves(outlines) if isinstance(x, Tensor)):
            return func(*args, **kwargs)
        found = tree_map_only(Tensor, lambda x: zeros(x.shape, x.stride(), x.dtype), outlines)
        return found.fill_(True) if func._schema.name == "aten::all" else found

    def _outlines_of(self, func: Callable, args: tuple, kwargs: dict):
        """Results on the meta device. Every layer asks for the same, which takes a millisecond to find out."""
        leaves, form = tree_flatten((args, kwargs))
        outlines = (
            (x.shape, x.stride(), x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else (type(x), x)
            for x in leaves
        )
        key = (func, form, torch.is_grad_enabled(), tuple(outlines))
        try:
            known = self._known.get(key)
        except TypeError:  # an argument that has no hash
            known = key = None
        if known is None:
            with torch.device("meta"):
                device = {"device": "meta"} if "device" in kwargs else {}
                known = func(*_on_meta(args), **_on_meta(kwargs) | device)
            if key is not None:
                self._known[key] = known
        return known


def zeros(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros on pages that the system hands out once they are touched, and that nobody has had before."""
    elements = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if math.prod(shape) else 0
    memory = mmap.mmap(-1, max(elements, 1) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, stride)


def _written(func: Callable, args: tuple, kwargs: dict):
    """What an operation that writes into its arguments returns: those."""
    written = [(i, a.name) for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]
    targets = [args[i] if i < len(args) else kwargs[name] for i, name in written]
    returned = len(func._schema.returns)
    return None if returned == 0 else targets[0] if returned == 1 else tuple(targets[:returned])


def _on_meta(tree):
    return tree_map_only(Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), tree)
