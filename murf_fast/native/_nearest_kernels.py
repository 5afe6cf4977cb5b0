"""The kernels of a search: rows prepared for products, products reduced to candidates, candidates scored."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import address, dtype_tag, empty, extension, rows_of


def prepare(x: Tensor, mean: Tensor | None, scale: Tensor, out: Tensor, role: str) -> tuple[Tensor, Tensor]:
    """``out = x * scale - mean`` rounded, with the columns of ``role``; returns squared norms and errors of the rows.

    An empty ``scale`` stands for ones.
    """
    rows, dim = x.shape
    squares, errors = empty((rows,), torch.float64), empty((rows,), torch.float64)
    width = dim if role == "plain" else dim + 6
    if out.ndim != 2 or len(out) != rows or out.shape[1] < width:
        raise ValueError(f"murf_fast: prepared rows must be ({rows}, {width} or more), got {tuple(out.shape)}")
    extension.nearest_prepare(
        x=rows_of(x, scale),
        mean=address(mean, torch.float32, dim),
        out_dtype=dtype_tag(out.dtype),
        out=address(out, out.dtype, out.numel()),
        out_stride=out.stride(0),
        role=role,
        squared_norms=address(squares, torch.float64, rows),
        errors=address(errors, torch.float64, rows),
        threads=_fork.threads(),
    )
    return squares, errors


class State:
    """What a search knows about its queries: candidates, upper bounds, exact distances; see csrc/types.h."""

    def __init__(self, queries: int, k: int, capacity: int) -> None:
        self.k, self.capacity = k, capacity
        self.tensors = {name: empty((queries, width), dtype) for name, (dtype, width) in self._arrays.items()}
        self.forget()

    def forget(self) -> None:
        for name in ("count", "uppers", "exacts"):
            self.tensors[name].zero_()

    def upper(self) -> Tensor:
        """(Q,) float32: what the distance of the k-th nearest row is at most; infinity before k rows were seen."""
        upper, uppers = self.tensors["upper"], self.tensors["uppers"]
        return torch.where(uppers[:, 0] < self.k, torch.inf, upper[:, 0])

    @property
    def _arrays(self) -> dict[str, tuple[torch.dtype, int]]:
        """Dtype and entries per query."""
        return {
            "lower": (torch.float32, self.capacity),
            "index": (torch.int64, self.capacity),
            "count": (torch.int32, 1),
            "upper": (torch.float32, self.k),
            "uppers": (torch.int32, 1),
            "exact": (torch.float64, self.k),
            "exact_index": (torch.int64, self.k),
            "exacts": (torch.int32, 1),
        }

    def part(self, rows: slice) -> State:
        part = State.__new__(State)
        part.k, part.capacity = self.k, self.capacity
        part.tensors = {name: x[rows] for name, x in self.tensors.items()}
        return part

    def native(self, queries: int) -> Any:
        """For the kernels, which walk so many queries."""
        addresses = {
            name: address(self.tensors[name], dtype, queries * width) for name, (dtype, width) in self._arrays.items()
        }
        return extension.NearestState(k=self.k, capacity=self.capacity, **addresses)


class Block(NamedTuple):
    """Which rows of the bank a block of products belongs to, the largest error and squared norm of these, and the
    errors of a product as csrc/types.h has them. Rows are those from ``first`` on, or the numbered ones.
    """

    first: int
    rows: Tensor | None
    error: float
    squared_norm: float
    absolute: float
    relative: float


def scan(
    product: Tensor,
    block: Block,
    query: tuple[Tensor, Tensor],
    errors: Tensor,
    squared_norms: Tensor,
    numbers: Tensor | None,
    bank: tuple[Tensor, Tensor],
    state: State,
    metric: str,
) -> None:
    """Reduces a block of products to candidates. It is of all queries, or of those with the ``numbers``."""
    count, columns = len(query[0]), product.shape[1]
    if block.rows is None and block.first + columns > len(bank[0]):
        raise ValueError(f"murf_fast: products end at row {block.first + columns} of a bank of {len(bank[0])}")
    if numbers is None and len(product) > count:
        raise ValueError(f"murf_fast: products of {len(product)} queries for {count}")
    extension.nearest_scan(
        product_dtype=dtype_tag(product.dtype),
        products=rows_of(product).data,
        block=extension.NearestBlock(
            stride=product.stride(0),
            count=len(product),
            first=block.first,
            columns=columns,
            queries=address(numbers, torch.int64, len(product)),
            rows=address(block.rows, torch.int64, columns),
            query_errors=address(errors, torch.float64, count),
            query_squared_norms=address(squared_norms, torch.float64, count),
            error=block.error,
            squared_norm=block.squared_norm,
            absolute=block.absolute,
            relative=block.relative,
        ),
        query=rows_of(*query),
        bank=rows_of(*bank),
        state=state.native(count),
        metric=metric,
        threads=_fork.threads(),
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
    extension.nearest_finish(
        query=rows_of(*query),
        bank=rows_of(*bank),
        state=state.native(count),
        metric=metric,
        distances=address(distances, torch.float32, count * state.k),
        indices=address(indices, torch.int64, count * state.k),
        threads=_fork.threads(),
    )
