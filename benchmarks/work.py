"""What a call cannot avoid: the bytes that it reads and writes once, and the operations of its definition.

Both are counted from the tensors of a call that allocates but does not compute (weightless.py): every tensor from
outside that an operation reads, every result that the caller gets, once, however often caches are missed; intermediate
tensors not at all. So are operations, whatever computes them: see formulas.py for ours, and
``torch.utils.flop_counter`` for PyTorch's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from formulas import operations_of
from registry import Case
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from weightless import OWN, Weightless, zeros

from murf_fast.ops._flops import low_copy

# What takes some rows of a tensor reads those alone.
TAKES = ("aten::index", "aten::index_select", "aten::gather", "aten::embedding", "aten::take")


@dataclass
class Work:
    """Of one call. ``operations`` by the dtype of the operands: a multiply-add is two."""

    read: int = 0
    written: int = 0
    operations: dict[str, int] = field(default_factory=dict)
    ops: tuple[str, ...] = ()  # of this library, that were called

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def as_row(self) -> dict:
        """What a record keeps."""
        return {"read": self.read, "written": self.written, "operations": self.operations, "ops": list(self.ops)}


def work_of(case: Case) -> Work:
    """Of a case at its full size, by its second call: what the first one keeps, the timed ones find."""
    return work_of_call(lambda: case.build("cpu", case.dtype).ours)


def work_of_call(build: Callable[[], Callable[[], object]]) -> Work:
    """Of what ``build`` returns; nothing is computed in either."""
    with Outlined():
        call = build()
    return counted(call)


def counted(call: Callable[[], object]) -> Work:
    """Of ``call``'s second run."""
    with torch.autograd.set_multithreading_enabled(False):  # a backward elsewhere would not see the mode
        with Counting():
            call()
        with Counting() as mode:
            result = call()
        return mode.work(result)


class Outlined(Weightless):
    """Weightless, our operations and oneDNN's included: their results are zeros of the right outlines."""

    def __torch_dispatch__(self, func: Callable, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == OWN:
            outlines = func(*_on_meta(args), **_on_meta(kwargs))
            return tree_map_only(Tensor, lambda x: zeros(x.shape, x.stride(), x.dtype), outlines)
        if func.namespace == "mkldnn":
            return _product(func, args)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _product(func: Callable, args: tuple) -> Tensor:
    """A packed weight has no outline: the weight stands for it."""
    if func._schema.name == "mkldnn::_reorder_linear_weight":
        return args[0].clone()
    if func._schema.name != "mkldnn::_linear_pointwise":
        raise NotImplementedError(f"{func._schema.name} has no outline here")
    x, weight = args[:2]
    shape = (*x.shape[:-1], weight.shape[0])
    return zeros(shape, torch.empty(shape, device="meta").stride(), x.dtype)


class Counting(Outlined):
    """Outlined, and a record of what was read, made and computed."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, Tensor] = {}  # by storage; kept, so that no address comes twice
        self._read: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        self._written: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        self._operations: dict[str, int] = defaultdict(int)
        self._ops: list[str] = []

    def __torch_dispatch__(self, func: Callable, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == OWN:
            self._ops.append(func._schema.name.split("::")[1])
        self._note(func, args, kwargs or {}, result)
        return result

    def _note(self, func: Callable, args: tuple, kwargs: dict, result: object) -> None:
        for unit, count in operations_of(func, args, kwargs, result).items():
            self._operations[unit] += count
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return  # a view
        names = [a.name for a in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        if func.namespace == OWN and given.get("index") and low_copy(given["index"]) is not None:
            given["bank"] = None  # a few rows of it, which the data decides
        for a in func._schema.arguments:
            for x in tree_leaves(given.get(a.name)):
                if not isinstance(x, Tensor) or _storage(x) in self._made:
                    continue
                is_written = a.alias_info is not None and a.alias_info.is_write
                where = _extent(x)
                if is_written:
                    self._written[_storage(x)].append(where)
                elif func._schema.name in TAKES and a.name in ("self", "weight"):
                    taken = sum(r.numel() * r.element_size() for r in results)
                    self._read[_storage(x)].append((*where[:2], min(where[2], taken)))
                elif func._schema.name not in ("aten::empty_like", "aten::new_empty", "aten::new_empty_strided"):
                    self._read[_storage(x)].append(where)
        for x in results:
            if _storage(x) not in self._written:
                self._made.setdefault(_storage(x), x)

    def work(self, result: object) -> Work:
        """Of all that ran, given what the caller gets."""
        found = Work(operations=dict(self._operations), ops=tuple(dict.fromkeys(self._ops)))
        found.read = sum(_covered(parts) for parts in self._read.values())
        for x in _tensors(result):
            if _storage(x) in self._made:
                self._written[_storage(x)].append(_extent(x))
        found.written = sum(_covered(parts) for parts in self._written.values())
        return found


def _on_meta(tree):
    return tree_map_only(Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), tree)


def _tensors(result: object) -> Iterator[Tensor]:
    """Of what a call returns; a subclass of a list is a leaf to pytree."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (list, tuple)):
        for entry in result:
            yield from _tensors(entry)
    elif isinstance(result, dict):
        yield from _tensors(list(result.values()))


def _storage(x: Tensor) -> int:
    return x.data_ptr() if x.layout != torch.strided else x.untyped_storage().data_ptr()


def _extent(x: Tensor) -> tuple[int, int, int]:
    """First byte, end, and bytes of the elements that differ by their address."""
    if not x.numel():
        return 0, 0, 0
    if x.layout != torch.strided:  # packed by a library
        size = x.numel() * x.element_size()
        return 0, size, size
    shape = [(n, s) for n, s in zip(x.shape, x.stride(), strict=True) if s]
    elements = 1
    for n, _ in shape:
        elements *= n
    begin = x.storage_offset() * x.element_size()
    span = 1 + sum((n - 1) * s for n, s in shape)
    return begin, begin + span * x.element_size(), min(elements, span) * x.element_size()


def _covered(parts: list[tuple[int, int, int]]) -> int:
    """Bytes of the parts of one storage: those that overlap once, and no more than their elements have."""
    total, end = 0, 0
    for begin, stop, _ in sorted(parts):
        total += max(0, stop - max(begin, end))
        end = max(end, stop)
    return min(total, sum(size for _, _, size in set(parts)))
