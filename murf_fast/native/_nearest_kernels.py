"""The kernels of a search: rows prepared for products, products reduced to candidates, candidates scored."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast._extension import module
from murf_fast.native._address import address, dtype_tag, empty, rows_of


def prepare(x: Tensor, mean: Tensor | None, scale: Tensor, out: Tensor, role: str) -> tuple[Tensor, Tensor]:
    """``out = x * scale - mean`` rounded, with the columns of ``role``; returns squared norms and errors of the rows.

    An empty ``scale`` stands for ones.
    """
    rows, dim = x.shape
    squares, errors = empty((rows,), torch.float64), empty((rows,), torch.float64)
    width = dim if role == "plain" else dim + 6
    if out.ndim != 2 or len(out) != rows or out.shape[1] < width:
        raise ValueError(f"murf_fast: prepared rows must be ({rows}, {width} or more), got {tuple(out.shape)}")
    module().nearest_prepare(
        rows_of(x, scale),
        address(mean, torch.float32, dim),
        dtype_tag(out),
        address(out, out.dtype, out.numel()),
        out.stride(0),
        getattr(module().NearestRole, role),
        address(squares, torch.float64, rows),
        address(errors, torch.float64, rows),
        _fork.threads(),
    )
    return squares, errors


class State:
    """What a search knows about its queries: candidates, upper bounds, exact distances; see csrc/types.h."""

    def __init__(self, queries: int, k: int, capacity: int) -> None:
        self.k, self.capacity = k, capacity
        self.tensors = [
            empty((queries, width), dtype).zero_() if dtype == torch.int32 else empty((queries, width), dtype)
            for dtype, width in self._arrays
        ]

    @property
    def _arrays(self) -> tuple[tuple[torch.dtype, int], ...]:
        """Dtype and entries per query, in the order of the struct; 32-bit integers are counts."""
        count = (torch.int32, 1)
        candidates = ((torch.float32, self.capacity), (torch.int64, self.capacity), count)
        bounds, exact = (torch.float32, self.k), ((torch.float64, self.k), (torch.int64, self.k))
        return (*candidates, bounds, count, *exact, count)

    def part(self, rows: slice) -> State:
        part = State.__new__(State)
        part.k, part.capacity, part.tensors = self.k, self.capacity, [t[rows] for t in self.tensors]
        return part

    def native(self, queries: int) -> tuple:
        """For the kernels, which walk so many queries."""
        addresses = tuple(
            address(t, dtype, queries * width) for t, (dtype, width) in zip(self.tensors, self._arrays, strict=True)
        )
        return self.k, self.capacity, addresses


def scan(
    product: Tensor,
    first: int,
    queries: tuple[Tensor, Tensor],
    block: tuple[float, float],
    absolute: float,
    relative: float,
    query: tuple[Tensor, Tensor],
    bank: tuple[Tensor, Tensor],
    state: State,
) -> None:
    """Reduces a block of products to candidates. ``queries``: errors, squared norms; ``block``: the largest of each."""
    errors, squares = queries
    count, columns = len(query[0]), product.shape[1]
    if first + columns > len(bank[0]):
        raise ValueError(f"murf_fast: products end at row {first + columns} of a bank of {len(bank[0])}")
    module().nearest_scan(
        dtype_tag(product),
        rows_of(product)[0],
        (
            product.stride(0),
            first,
            columns,
            address(errors, torch.float64, count),
            address(squares, torch.float64, count),
            *block,
            absolute,
            relative,
        ),
        rows_of(*query),
        rows_of(*bank),
        state.native(max(count, len(product))),
        _fork.threads(),
    )


def finish(
    query: tuple[Tensor, Tensor],
    bank: tuple[Tensor, Tensor],
    state: State,
    metric: str,
    distances: Tensor,
    indices: Tensor,
) -> None:
    count = len(query[0])
    module().nearest_finish(
        rows_of(*query),
        rows_of(*bank),
        state.native(count),
        getattr(module().NearestMetric, metric),
        address(distances, torch.float32, count * state.k),
        address(indices, torch.int64, count * state.k),
        _fork.threads(),
    )
