"""Triton's interpreter with checked addresses.

The interpreter loads and stores wherever a pointer leads, one program after another, so that it shows neither an access
outside the tensors nor a race. Within :func:`checked` every access of a launch is held against the tensors that were
passed, element by element of each view, and against what other programs of the launch did:

- an address must be that of an element of a tensor argument, and be used with an element of its size;
- no two programs store to one address, no store writes two values to one address;
- no program loads what another program of the same launch stores, before or after it;
- no program loads what it has stored itself without a barrier in between: another thread may have stored it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

NOBODY, SEVERAL = -1, -2


class MemoryFault(AssertionError):
    """A kernel's access that would be wrong, or a race, on a GPU."""


class Allocation:
    """The storage behind some tensor arguments, in cells of the smallest element among them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        storage = tensors[0].untyped_storage()
        self.begin, self.end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        self.cell = min(x.element_size() for x in tensors)
        cells = storage.nbytes() // self.cell
        self.sizes = np.zeros(cells, np.uint8)  # of the element that begins at a cell; 0: none does
        self.writer = np.full(cells, NOBODY, np.int32)
        self.written_at = np.zeros(cells, np.int32)
        self.reader = np.full(cells, NOBODY, np.int32)
        for x in tensors:
            if x.numel():
                size = x.element_size()
                elements = self.sizes[x.storage_offset() * size // self.cell :]
                strides = [n * size // self.cell * elements.itemsize for n in x.stride()]
                np.lib.stride_tricks.as_strided(elements, x.shape, strides)[...] = size


class Launch:
    """The memory of one launch, and who has touched it."""

    def __init__(self, kernel: str, tensors: list[Tensor]) -> None:
        self.kernel = kernel
        by_storage: dict[int, list[Tensor]] = {}
        for x in tensors:
            by_storage.setdefault(x.untyped_storage().data_ptr(), []).append(x)
        self.allocations = sorted((Allocation(group) for group in by_storage.values()), key=lambda a: a.begin)
        self.begins = np.array([a.begin for a in self.allocations], np.uint64)
        self.epoch, self.program = 0, NOBODY

    def at(self, grid_index: tuple[int, ...], grid: tuple[int, ...]) -> None:
        program = (grid_index[2] * grid[1] + grid_index[1]) * grid[0] + grid_index[0]
        if program != self.program:
            self.program, self.epoch = program, self.epoch + 1

    def load(self, addresses: np.ndarray, size: int) -> None:
        for a, cells in self._cells(addresses, size, "loads"):
            writer = a.writer[cells]
            if ((writer != NOBODY) & (writer != self.program)).any():
                self._fail("loads what another program of the launch has stored", cells)
            if ((writer == self.program) & (a.written_at[cells] == self.epoch)).any():
                self._fail("loads what it has stored, without a barrier", cells)
            reader = a.reader[cells]
            a.reader[cells] = np.where((reader == NOBODY) | (reader == self.program), self.program, SEVERAL)

    def store(self, addresses: np.ndarray, values: np.ndarray, size: int) -> None:
        unique, first, inverse = np.unique(addresses, return_index=True, return_inverse=True)
        if len(unique) < len(addresses) and not np.array_equal(
            values[first][inverse], values, equal_nan=values.dtype.kind == "f"
        ):
            self._fail("stores two values to one address at once", addresses)
        for a, cells in self._cells(unique, size, "stores"):
            writer, reader = a.writer[cells], a.reader[cells]
            if ((writer != NOBODY) & (writer != self.program)).any():
                self._fail("stores where another program of the launch has stored", cells)
            if ((reader != NOBODY) & (reader != self.program)).any():
                self._fail("stores what another program of the launch has loaded", cells)
            a.writer[cells], a.written_at[cells] = self.program, self.epoch

    def _cells(self, addresses: np.ndarray, size: int, does: str) -> Iterator[tuple[Allocation, np.ndarray]]:
        """The allocations that addresses lie in, and the cells."""
        which = np.searchsorted(self.begins, addresses, side="right").astype(np.int64) - 1
        for i in np.unique(which):
            here = addresses[which == i]
            if i < 0 or (here >= np.uint64(self.allocations[i].end)).any():
                self._fail(f"{does} outside all tensors", here)
            a = self.allocations[i]
            offset = (here - np.uint64(a.begin)).astype(np.int64)
            cells = offset // a.cell
            if (offset % a.cell).any() or (a.sizes[cells] != size).any():
                self._fail(f"{does} {size} bytes that are no element of a tensor", here)
            yield a, cells

    def _fail(self, what: str, where: np.ndarray) -> None:
        raise MemoryFault(f"{self.kernel}, program {self.program}, {what} ({len(where)} addresses in this access)")


def _tensors(arguments: object) -> Iterator[Tensor]:
    for x in arguments:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, tuple):
            yield from _tensors(x)


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Checks every launch in the interpreter; a fault raises :class:`MemoryFault` out of it."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    originals = {
        (builder, "create_masked_load"): builder.create_masked_load,
        (builder, "create_masked_store"): builder.create_masked_store,
        (builder, "create_barrier"): builder.create_barrier,
        (executor, "__call__"): executor.__call__,
    }
    launches: list[Launch] = []

    def active(self, pointers, mask) -> tuple[Launch, np.ndarray, np.ndarray, int]:
        launch = launches[-1]
        launch.at(self.grid_idx, self.grid_dim)
        chosen = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        return launch, pointers.data[chosen].ravel(), chosen, pointers.get_element_ty().primitive_bitwidth // 8

    def load(self, pointers, mask, *others):
        launch, addresses, _, size = active(self, pointers, mask)
        launch.load(addresses, size)
        return originals[builder, "create_masked_load"](self, pointers, mask, *others)

    def store(self, pointers, value, mask, *others):
        launch, addresses, chosen, size = active(self, pointers, mask)
        launch.store(addresses, np.broadcast_to(value.data, chosen.shape)[chosen].ravel(), size)
        return originals[builder, "create_masked_store"](self, pointers, value, mask, *others)

    def barrier(self):
        launches[-1].epoch += 1
        return originals[builder, "create_barrier"](self)

    def call(self, *arguments, **options):
        launches.append(Launch(self.fn.__name__, list(_tensors((*arguments, *options.values())))))
        try:
            return originals[executor, "__call__"](self, *arguments, **options)
        except interpreter.InterpreterError as error:
            if isinstance(error.__cause__, MemoryFault):
                raise error.__cause__ from None
            raise
        finally:
            launches.pop()

    for (owner, name), replacement in zip(originals, (load, store, barrier, call), strict=True):
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)
