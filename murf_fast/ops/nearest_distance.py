"""Distances to the nearest rows of a bank; the matrix of all distances never exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast._constant import constant_while_compiling
from murf_fast.annotations import Backend, Metric, Precision
from murf_fast.ops import _cells, _checks, _contract, _nearest_float64
from murf_fast.ops._ivf import IVFIndex
from murf_fast.ops._library import register
from murf_fast.ops._rows import check_finite, contiguous_rows, matrix
from murf_fast.tables._table import is_capturing
from murf_fast.tables.nearest_cells import Cells

METRICS = ("l2", "l2sq", "cosine", "ip")
INDICES = ("exact", "ivf")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
OP = "nearest_distance"


class NearestIndex:
    """A bank prepared for many searches: mean removed, a low-precision copy, measured errors and norms.

    Args:
        bank: (M, D), floating point; a tensor, or a NumPy array such as ``np.memmap``. Held, not copied, where its rows
            are contiguous: keep it unchanged. It is read block by block, so it may be larger than the memory.
        cosine: Prepare for ``metric="cosine"``; else for ``"l2"`` and ``"l2sq"``.
        ip: Prepare for ``metric="ip"``. The mean stays then, as it would change the products.
        cells: Partition the bank into so many cells of near rows (k-means), of which a search skips those that the
            triangle inequality proves too far, rounding included. ``"auto"``: one per 512 rows, at most 1024, and none
            for banks below 8192 rows or on GPUs, where it has not been measured yet. The answers are those without
            cells, bit for bit. On a CPU some evenly spaced queries of a call, 4 to 32, go first: where they would look
            at more than a third of the rows, as random rows in many dimensions do, the call scans them all. On a GPU
            tiles of 128 queries share cells, no pair is looked at twice, and nobody has to go first; the bank must be
            on the GPU. Calls of fewer than 256 queries scan all rows, as choosing would take as long (with a copy in
            bfloat16 or float16 the CPU meets rows cell by cell then, and the fewer queries, the longer it takes beside
            an index without cells), and so do float64 searches and the reference.
        precision: Dtype of the copy that candidates are found with. ``"float32"`` makes no copy; ``"auto"`` takes
            bfloat16 on GPUs and on processors with bfloat16 instructions, else float32. No choice changes the answers.
        device: Where the search runs; None: where the bank is. With a bank in host memory and a CUDA device, blocks of
            the bank go to the device during the search.
        backend: As for every op.

    Attributes:
        searched: Share of the rows that the last search looked at, the mean over its queries; None before the first,
            one without cells.

    Raises:
        TypeError, ValueError: An argument is wrong: an empty bank, one without values (``meta``), rows that are not
            finite (which), rows of zeros for cosine distances.

    Memory: the copy (M x D of ``precision``, if not float32), 8 bytes a row for cosine, and one block. N cells: 8 bytes
    a row, 16 N^2 bytes and 8 N D; while they are made, 64 rows a cell and a few blocks, in the time of about two
    searches with N queries per iteration of the k-means and one product of bank and centres in float64.
    """

    def __init__(
        self,
        bank: Tensor | np.ndarray,
        *,
        cosine: bool = False,
        ip: bool = False,
        cells: int | Literal["auto"] | None = None,
        precision: Precision = "auto",
        device: torch.device | str | None = None,
        backend: Backend | None = None,
    ) -> None:
        bank = matrix(OP, "bank", bank)
        _checks.no_gradients(OP, "a nearest distance", [bank])
        self.bank = contiguous_rows(bank)
        _check_bank(self.bank, precision)
        if self.bank.is_meta:
            raise ValueError(f"murf_fast.{OP}: `bank` must have values to prepare, got a meta tensor")
        self.cosine, self.ip = _checks.flag(OP, "cosine", cosine), _checks.flag(OP, "ip", ip)
        if self.cosine and self.ip:
            raise ValueError(f"murf_fast.{OP}: `cosine` and `ip` exclude each other")
        if cells is not None and not (isinstance(cells, str) and cells == "auto"):
            cells = _checks.integer(OP, "cells", cells, 1)
        if cells is not None and self.ip:
            raise ValueError(f"murf_fast.{OP}: `cells` bound distances; they exclude `ip`")
        self.precision = precision
        self.device = self.bank.device if device is None else _device(device)
        if self.device != self.bank.device and self.bank.device.type != "cpu":
            raise ValueError(f"murf_fast.{OP}: `bank` must be on the CPU or on {self.device}, got {self.bank.device}")
        if isinstance(cells, int) and self.device != self.bank.device:
            raise ValueError(
                f"murf_fast.{OP}: `cells` need the bank where the search runs, on {self.device}, got it on "
                f"{self.bank.device}; move it there, or leave `cells` out"
            )
        self.asked_for = backends.asked_for(backend)
        self.backend: Backend = backends.resolve(backend, self.device.type, self.bank.dtype)
        self.tensors: list[Tensor] = []
        self.cells: Cells | None = None
        self._searched: Tensor | None = None
        if self.backend == "reference":
            _check_rows("bank", self.bank, self.cosine)
            return
        if cells == "auto" and self.backend != "native":
            cells = None
        count = _cells.count_of(cells, len(self.bank)) if cells else 0
        self.tensors = backends.launcher(self.backend).nearest_index(
            self.bank.detach(), self.metrics[0], precision, self.device, *([self._partition(count)] if count else [])
        )

    def __len__(self) -> int:
        return len(self.bank)

    def __repr__(self) -> str:
        rows, columns = self.bank.shape
        cells = None if self.cells is None else len(self.cells.begins) - 1
        return (
            f"NearestIndex({rows} rows of {columns}, {self.bank.dtype}, metrics={self.metrics}, "
            f"precision={self.precision!r}, cells={cells}, device={str(self.device)!r}, backend={self.backend!r})"
        )

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that the index was prepared for, the default one first."""
        return ("cosine",) if self.cosine else ("ip",) if self.ip else ("l2", "l2sq")

    @property
    def searched(self) -> float | None:
        if self.cells is None:
            return 1.0
        return None if self._searched is None else float(self._searched)

    def add(self, rows: Tensor | np.ndarray) -> None:
        """Appends rows (m, D) of the bank's dtype, which get the next indices; searches then are those of all rows.

        Nothing is prepared again: the mean that was taken off remains, with the errors of the new rows measured, and
        with cells every new row goes to the one of the nearest centre, which grows.

        Raises:
            TypeError, ValueError: As when the index was made.

        Memory: the bank becomes a copy of both parts (a mapped one, too, is in memory then), and so does the
        low-precision copy.
        """
        rows = contiguous_rows(matrix(OP, "rows", rows))
        _checks.no_gradients(OP, "a nearest distance", [rows])
        if rows.dtype != self.bank.dtype:
            raise TypeError(f"murf_fast.{OP}: `rows` must be {self.bank.dtype} as the bank, got {rows.dtype}")
        if rows.shape[1] != self.bank.shape[1] or rows.device != self.bank.device:
            raise ValueError(
                f"murf_fast.{OP}: `rows` must have {self.bank.shape[1]} columns on {self.bank.device} as the bank, got "
                f"shape {tuple(rows.shape)} on {rows.device}"
            )
        if not len(rows):
            return
        if self.backend == "reference":
            _check_rows("rows", rows, self.cosine)
            self.bank = torch.cat([self.bank, rows])
            return
        begin, bank = len(self.bank), torch.cat([self.bank, rows])
        grown: list[Cells] = []
        self.tensors = backends.launcher(self.backend).extended_index(
            bank.detach(), self.tensors, self.metrics[0], begin, *([self._grown(bank, grown)] if self.cells else [])
        )
        self.bank, self.cells = bank, grown[0] if grown else None

    def _partition(self, count: int) -> Callable[[Tensor, Tensor], Cells]:
        def partition(mean: Tensor, scale: Tensor) -> Cells:
            self.cells = _cells.partition(self.bank.detach(), mean, scale, count, self._nearest)
            return self.cells

        return partition

    def _grown(self, bank: Tensor, found: list[Cells]) -> Callable[[Tensor, Tensor], Cells]:
        def grown(mean: Tensor, scale: Tensor) -> Cells:
            found.append(_cells.grown(bank, mean, scale, cast("Cells", self.cells), self._nearest))
            return found[0]

        return grown

    def _nearest(self, query: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        return nearest_distance(query, centres, backend=self.backend)


def nearest_distance(
    query: Tensor,
    bank: Tensor | NearestIndex | IVFIndex,
    *,
    k: int = 1,
    metric: Metric | None = None,
    precision: Precision = "auto",
    index: Literal["exact", "ivf"] = "exact",
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of a bank for every query, exactly, without the (Q, M) matrix of distances.

    ``d(q, b) = |q - b|`` (``"l2"``), ``|q - b|^2`` (``"l2sq"``) or ``1 - q.b / (|q| |b|)`` (``"cosine"``). Blocks of a
    matrix product in ``precision`` are reduced, as they are made, to the rows that can still be among the k nearest
    by a bound on the product's error; those are scored by direct differences, in float64 where float32 cannot decide.
    ``"ip"`` takes the largest inner products ``q.b`` for the nearest, scored in float64.

    Args:
        query: (Q, D), floating point; any strides.
        bank: (M, D) on the queries' device; or a prepared :class:`NearestIndex` or :class:`IVFIndex`, which pays off
            from the second search on. Floating point, not necessarily the queries' dtype; with either in float64 the
            search is done in float64.
        k: Neighbours per query, at most M.
        metric: ``"l2"``, ``"l2sq"``, ``"cosine"`` or ``"ip"``. None: that of a prepared index, else ``"l2"``.
        precision: As for :class:`NearestIndex`, for a bank that is not prepared.
        index: ``"exact"``, or ``"ivf"``: approximate, by faiss, see :class:`IVFIndex`.
        backend: ``"reference"``, ``"native"`` or ``"triton"``; None chooses by device.

    Returns:
        distances (Q, k) in float32 (float64 if either input is), rising, and indices (Q, k) in int64. Among equal
        distances the lower index comes first. Of ``"ip"`` the inner products themselves, falling, as faiss gives them.

    Raises:
        TypeError, ValueError: An argument is wrong; rows that are not finite are named.
        RuntimeError: The call is captured in a CUDA graph: the host looks at what a search finds.
        BackendUnavailableError: ``backend`` cannot take this call.

    Memory: independent of Q x M: a prepared copy of at most 8192 queries with their candidates and one block of
    products, under 64 MB up to D = 1024 beside the index. float64, of queries or bank, takes the same way in blocks of
    PyTorch's products on every device, in under 128 MB and without a copy of the bank; on GPUs ``"ip"`` does, too. An
    index with cells: 64 MB more, on a GPU 128 MB.

    Source: MuRF 3.2 and MRF-AD section 4 (faiss IndexFlatL2, IndexFlatIP and IndexIVFFlat); PatchCore; AnomalyDINO.
    """
    query = matrix(OP, "query", query)
    _checks.choice(OP, "index", index, INDICES)
    _checks.choice(OP, "precision", precision, PRECISIONS)
    if metric is None:
        metric = "cosine" if getattr(bank, "cosine", False) else "ip" if getattr(bank, "ip", False) else "l2"
    _checks.choice(OP, "metric", metric, METRICS)
    cosine = metric == "cosine"
    if not isinstance(bank, (NearestIndex, IVFIndex)):
        bank = matrix(OP, "bank", bank)
        _check_bank(bank, precision)
        if index == "ivf":
            if metric == "ip":
                raise ValueError(f'murf_fast.{OP}: `metric` must be a distance with index="ivf", got "ip"')
            bank = IVFIndex(bank, cosine=cosine)
    held: Any = None if isinstance(bank, Tensor) else bank
    prepared = held is not None
    ip = prepared and getattr(held, "ip", False)
    if prepared and (held.cosine, ip) != (cosine, metric == "ip"):
        raise ValueError(
            f"murf_fast.{OP}: `metric` is {metric!r}, but the index was prepared with cosine={held.cosine}"
            + (f" and ip={ip}" if isinstance(bank, NearestIndex) else "")
        )
    rows: Tensor = bank if isinstance(bank, Tensor) else bank.bank
    k = _checks.integer(OP, "k", k, 1)
    if k > rows.shape[0]:
        raise ValueError(f"murf_fast.{OP}: `k` must be at most the {rows.shape[0]} rows of the bank, got {k}")
    if query.shape[1] != rows.shape[1]:
        raise ValueError(
            f"murf_fast.{OP}: `query` must have the {rows.shape[1]} columns of the bank, got {query.shape[1]}"
        )
    if query.device != bank.device:
        raise ValueError(
            f"murf_fast.{OP}: `query` must be on the device of the bank, {bank.device}, got {query.device}"
        )
    _checks.no_gradients(OP, "a nearest distance", [query, rows])
    if isinstance(bank, IVFIndex):
        return bank.search(query, k, metric)
    dtype = torch.float64 if torch.float64 in (query.dtype, rows.dtype) else query.dtype
    if backend is None and prepared:
        # An index for float32 searches holds its bank: float64 queries are compared with that, in float64.
        backend = held.backend if dtype != torch.float64 or held.asked_for == "reference" else None
    if getattr(held, "cells", None) is not None:
        held._searched = torch.ones((), dtype=torch.float64, device="cpu")
    if dtype == torch.float64 and not _asked_for(backend):
        kernels = "triton" if query.is_cuda else "native"
        return _nearest_distance(query, rows, [], k, metric, precision, kernels)
    backend = _checks.backend(backend, query, dtype)
    if backend == "reference":
        _check_rows("query", query, cosine)
        if not prepared:
            _check_rows("bank", rows, cosine)
        return reference.nearest_distance(query, rows, k, metric)
    if prepared and backend != held.backend:
        raise ValueError(f"murf_fast.{OP}: the index was prepared for backend {held.backend!r}, not {backend!r}")
    if getattr(held, "cells", None) is not None:
        distances, indices, held._searched = _nearest_distance_cells(
            query, rows, held.tensors, list(held.cells), k, metric, backend
        )
        return distances, indices
    tensors = held.tensors if prepared else []
    return _nearest_distance(query, rows, tensors, k, metric, precision, backend)


@constant_while_compiling
def _asked_for(backend: str | None) -> str | None:
    return backends.asked_for(backend)


def _device(device: Any) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"murf_fast.{OP}: `device` must be a device or its name, got {device!r}") from None
    if found.type == "cuda" and found.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())  # as tensors on it name it
    return found


def _check_bank(bank: Tensor, precision: str) -> None:
    if bank.shape[0] == 0 or bank.shape[1] == 0:
        raise ValueError(f"murf_fast.{OP}: `bank` must have rows and columns, got shape {tuple(bank.shape)}")
    _checks.choice(OP, "precision", precision, PRECISIONS)


def _check_rows(name: str, x: Tensor, nonzero: bool) -> None:
    check_finite(OP, name, x)
    if nonzero:
        zero = (x == 0).all(1).nonzero().flatten()[:5].tolist()
        if zero:
            raise ValueError(f'murf_fast.{OP}: metric="cosine" needs nonzero rows, `{name}` has {zero}')


def _requires(op, query, bank, index, k, metric, precision, backend) -> None:
    _contract.tensor(op, "query", query, query, (None, None), _checks.DTYPES)
    _contract.backend(op, backend, query)
    # A bank may stay in host memory, from which a GPU search brings it in blocks.
    at_home = bank if backend == "triton" and bank.is_cpu else query
    _contract.tensor(op, "bank", bank, at_home, (None, query.shape[1]), _checks.DTYPES)
    if min(bank.shape) < 1:
        raise ValueError(f"murf_fast.{op}: `bank` must have rows and columns, got {tuple(bank.shape)}")
    if not 1 <= k <= len(bank):
        raise ValueError(f"murf_fast.{op}: `k` must be in 1 .. {len(bank)}, got {k}")
    _contract.one_of(op, "metric", metric, METRICS)
    _contract.one_of(op, "precision", precision, PRECISIONS)
    if index:
        _contract.count(op, "index", index, 0 if torch.float64 in (query.dtype, bank.dtype) else 5)
        _require_index(op, index, query, bank, metric == "cosine", backend)


def _requires_cells(op, query, bank, index, cells, k, metric, backend) -> None:
    _requires(op, query, bank, [], k, metric, "auto", backend)
    _contract.tensor(op, "query", query, query, (None, None), _contract.DTYPES)
    _contract.tensor(op, "bank", bank, bank, (None, None), _contract.DTYPES)
    _contract.one_of(op, "metric", metric, METRICS[:3])
    _contract.count(op, "index", index, 5)
    _contract.count(op, "cells", cells, len(Cells._fields))
    _contract.tensor(op, "begins", cells[1], query, (None,), (torch.int64,))
    count, floats = len(cells[1]) - 1, (torch.float64,)
    square = (count, count)
    shapes = (len(bank),), (count + 1,), (count, bank.shape[1]), (count,), square, square, (1,)
    for name, x, shape in zip(Cells._fields, cells, shapes, strict=True):
        _contract.tensor(op, name, x, query, shape, (torch.int64,) if name in ("rows", "begins") else floats)
        if not x.is_contiguous():
            raise ValueError(f"murf_fast.{op}: `{name}` must be contiguous")
    _require_index(op, index, query, bank, metric == "cosine", backend, count)


def _require_index(
    op: str, index: list[Tensor], query: Tensor, bank: Tensor, cosine: bool, backend: str, cells: int | None = None
) -> None:
    """The tensors of a prepared bank, as :class:`NearestIndex` holds them."""
    mean, scale, low, *rest = index
    rows, dim = bank.shape
    _contract.tensor(op, "index[0]", mean, query, (dim,), (torch.float32,))
    _contract.tensor(op, "index[1]", scale, query, (rows if cosine else 0,), (torch.float64,))
    shapes, others = backends.launcher(backend).index_layout(rows, dim, *([] if cells is None else [cells]))
    at_home = low.device == query.device or (low.is_cpu and query.is_cuda)
    if not at_home or (low.dtype, tuple(low.shape)) not in shapes:
        raise ValueError(f"murf_fast.{op}: `index[2]` is no copy of this bank, got {low.dtype} {tuple(low.shape)}")
    for i, (x, (shape, dtype)) in enumerate(zip(rest, others, strict=True), start=3):
        _contract.tensor(op, f"index[{i}]", x, query, shape, (dtype,))
    for i, x in enumerate(index):
        if not x.is_contiguous():
            raise ValueError(f"murf_fast.{op}: `index[{i}]` must be contiguous")


def _empty(query, bank, index, k, metric, precision, backend) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    dtype = torch.float64 if torch.float64 in (query.dtype, bank.dtype) else torch.float32
    return query.new_empty(shape, dtype=dtype), query.new_empty(shape, dtype=torch.int64)


def _launch(query, bank, index, k, metric, precision, backend, results) -> None:
    if torch.float64 in (query.dtype, bank.dtype) or (metric == "ip" and backend == "triton"):
        _nearest_float64.search(query, bank, k, metric, OP, *results)
        return
    if is_capturing(query.device):
        raise RuntimeError(
            f"murf_fast.{OP}: cannot be captured in a CUDA graph: the host refuses rows that are not finite, and "
            "searches again what the bounds do not prove"
        )
    kernels, query, bank = backends.launcher(backend), contiguous_rows(query), contiguous_rows(bank)
    index = index or kernels.nearest_index(bank, metric, precision, bank.device)
    kernels.nearest_distance(query, bank, index, k, metric, *results)


def _empty_cells(query, bank, index, cells, k, metric, backend) -> tuple[Tensor, Tensor, Tensor]:
    return *_empty(query, bank, index, k, metric, "auto", backend), query.new_empty((), dtype=torch.float64)


def _launch_cells(query, bank, index, cells, k, metric, backend, results) -> None:
    query, bank = contiguous_rows(query), contiguous_rows(bank)
    backends.launcher(backend).nearest_distance_cells(query, bank, index, Cells(*cells), k, metric, *results)


def _reference(query, bank, index, k, metric, precision, backend) -> tuple[Tensor, Tensor]:
    for name, x in (("query", query), ("bank", bank)):
        _check_rows(name, x, metric == "cosine")
    return reference.nearest_distance(query, bank, k, metric)


_nearest_distance = register(
    "nearest_distance(Tensor query, Tensor bank, Tensor[] index, SymInt k, str metric, str precision, "
    "str backend) -> (Tensor distances, Tensor indices)",
    _requires,
    _empty,
    _launch,
    reference=_reference,
)

_nearest_distance_cells = register(
    "nearest_distance_cells(Tensor query, Tensor bank, Tensor[] index, Tensor[] cells, SymInt k, str metric, "
    "str backend) -> (Tensor distances, Tensor indices, Tensor searched)",
    _requires_cells,
    _empty_cells,
    _launch_cells,
)
