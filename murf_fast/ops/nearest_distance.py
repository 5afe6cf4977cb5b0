"""Distances to the nearest rows of a bank; the matrix of all distances never exists."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast._constant import constant_while_compiling
from murf_fast.ops import _checks, _contract, _nearest_float64
from murf_fast.ops._ivf import IVFIndex
from murf_fast.ops._library import register
from murf_fast.ops._rows import check_finite, contiguous_rows, matrix

METRICS = ("l2", "l2sq", "cosine")
INDICES = ("exact", "ivf")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
OP = "nearest_distance"


class NearestIndex:
    """A bank prepared for many searches: mean removed, a low-precision copy, measured errors and norms.

    Args:
        bank: (M, D), floating point; a tensor, or a NumPy array such as ``np.memmap``. Held, not copied, where its rows
            are contiguous: keep it unchanged. It is read block by block, so it may be larger than the memory.
        cosine: Prepare for ``metric="cosine"``; else for ``"l2"`` and ``"l2sq"``.
        precision: Dtype of the copy that candidates are found with. ``"float32"`` makes no copy; ``"auto"`` takes
            bfloat16 on GPUs and on processors with bfloat16 instructions, else float32. No choice changes the answers.
        device: Where the search runs; None: where the bank is. With a bank in host memory and a CUDA device, blocks of
            the bank go to the device during the search.
        backend: As for every op.

    Raises:
        TypeError, ValueError: An argument is wrong: an empty bank, one without values (``meta``), rows that are not
            finite (which), rows of zeros for cosine distances.

    Memory: the copy (M x D of ``precision``, if not float32), 8 bytes a row for cosine, and one block.
    """

    def __init__(
        self,
        bank: Tensor | np.ndarray,
        *,
        cosine: bool = False,
        precision: str = "auto",
        device: torch.device | str | None = None,
        backend: str | None = None,
    ) -> None:
        bank = matrix(OP, "bank", bank)
        _checks.no_gradients(OP, "a nearest distance", [bank])
        self.bank = contiguous_rows(bank)
        _check_bank(self.bank, precision)
        if self.bank.is_meta:
            raise ValueError(f"murf_fast.{OP}: `bank` must have values to prepare, got a meta tensor")
        self.cosine, self.precision = _checks.flag(OP, "cosine", cosine), precision
        self.device = self.bank.device if device is None else _device(device)
        if self.device != self.bank.device and self.bank.device.type != "cpu":
            raise ValueError(f"murf_fast.{OP}: `bank` must be on the CPU or on {self.device}, got {self.bank.device}")
        self.asked_for = backends.asked_for(backend)
        self.backend = backends.resolve(backend, self.device.type, self.bank.dtype)
        self.tensors: list[Tensor] = []
        if self.backend == "reference":
            _check_rows("bank", self.bank, self.cosine)
        else:
            self.tensors = backends.launcher(self.backend).nearest_index(
                self.bank.detach(), self.cosine, precision, self.device
            )

    def __len__(self) -> int:
        return len(self.bank)


def nearest_distance(
    query: Tensor,
    bank: Tensor | NearestIndex | IVFIndex,
    *,
    k: int = 1,
    metric: str | None = None,
    precision: str = "auto",
    index: str = "exact",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of a bank for every query, exactly, without the (Q, M) matrix of distances.

    ``d(q, b) = |q - b|`` (``"l2"``), ``|q - b|^2`` (``"l2sq"``) or ``1 - q.b / (|q| |b|)`` (``"cosine"``). Blocks of a
    matrix product in ``precision`` are reduced, as they are made, to the rows that can still be among the k nearest
    by a bound on the product's error; those are scored by direct differences, in float64 where float32 cannot decide.

    Args:
        query: (Q, D), floating point; any strides.
        bank: (M, D) on the queries' device; or a prepared :class:`NearestIndex` or :class:`IVFIndex`, which pays off
            from the second search on. Floating point, not necessarily the queries' dtype; with either in float64 the
            search is done in float64.
        k: Neighbours per query, at most M.
        metric: ``"l2"``, ``"l2sq"`` or ``"cosine"``. None: that of a prepared index, else ``"l2"``.
        precision: As for :class:`NearestIndex`, for a bank that is not prepared.
        index: ``"exact"``, or ``"ivf"``: approximate, by faiss, see :class:`IVFIndex`.
        backend: ``"reference"``, ``"native"`` or ``"triton"``; None chooses by device.

    Returns:
        distances (Q, k) in float32 (float64 if either input is), rising, and indices (Q, k) in int64. Among equal
        distances the lower index comes first.

    Raises:
        TypeError, ValueError: An argument is wrong; rows that are not finite are named.
        BackendUnavailableError: ``backend`` cannot take this call.

    Memory: independent of Q x M: a prepared copy of at most 8192 queries with their candidates and one block of
    products, under 64 MB up to D = 1024 beside the index. float64, of queries or bank, takes the same way in blocks of
    PyTorch's products on every device, in under 128 MB and without a copy of the bank.

    Source: MuRF 3.2 and MRF-AD section 4 (faiss IndexFlatL2 and IndexIVFFlat); PatchCore; AnomalyDINO.
    """
    query = matrix(OP, "query", query)
    _checks.choice(OP, "index", index, INDICES)
    _checks.choice(OP, "precision", precision, PRECISIONS)
    if metric is None:
        metric = "cosine" if getattr(bank, "cosine", False) else "l2"
    _checks.choice(OP, "metric", metric, METRICS)
    cosine = metric == "cosine"
    if not isinstance(bank, (NearestIndex, IVFIndex)):
        bank = matrix(OP, "bank", bank)
        _check_bank(bank, precision)
        if index == "ivf":
            bank = IVFIndex(bank, cosine=cosine)
    prepared = not isinstance(bank, Tensor)
    if prepared and bank.cosine != cosine:
        raise ValueError(
            f"murf_fast.{OP}: `metric` is {metric!r}, but the index was prepared with cosine={bank.cosine}"
        )
    rows = bank.bank if prepared else bank
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
        backend = bank.backend if dtype != torch.float64 or bank.asked_for == "reference" else None
    if dtype == torch.float64 and not _asked_for(backend):
        kernels = "triton" if query.is_cuda else "native"
        return _nearest_distance(query, rows, [], k, metric, precision, kernels)
    backend = _checks.backend(backend, query, dtype)
    if backend == "reference":
        _check_rows("query", query, cosine)
        if not prepared:
            _check_rows("bank", rows, cosine)
        return reference.nearest_distance(query, rows, k, metric)
    if prepared and backend != bank.backend:
        raise ValueError(f"murf_fast.{OP}: the index was prepared for backend {bank.backend!r}, not {backend!r}")
    tensors = bank.tensors if prepared else []
    return _nearest_distance(query, rows, tensors, k, metric, precision, backend)


@constant_while_compiling
def _asked_for(backend: str | None) -> str | None:
    return backends.asked_for(backend)


def _device(device: object) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"murf_fast.{OP}: `device` must be a device or its name, got {device!r}") from None


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


def _require_index(op: str, index: list[Tensor], query: Tensor, bank: Tensor, cosine: bool, backend: str) -> None:
    """The tensors of a prepared bank, as :class:`NearestIndex` holds them."""
    mean, scale, low, *rest = index
    rows, dim = bank.shape
    _contract.tensor(op, "index[0]", mean, query, (dim,), (torch.float32,))
    _contract.tensor(op, "index[1]", scale, query, (rows if cosine else 0,), (torch.float64,))
    shapes, others = backends.launcher(backend).index_layout(rows, dim)
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
    if torch.float64 in (query.dtype, bank.dtype):
        _nearest_float64.search(query, bank, k, metric, OP, *results)
        return
    kernels, query, bank = backends.launcher(backend), contiguous_rows(query), contiguous_rows(bank)
    index = index or kernels.nearest_index(bank, metric == "cosine", precision, bank.device)
    kernels.nearest_distance(query, bank, index, k, metric, *results)


_nearest_distance = register(
    "nearest_distance(Tensor query, Tensor bank, Tensor[] index, SymInt k, str metric, str precision, "
    "str backend) -> (Tensor distances, Tensor indices)",
    _requires,
    _empty,
    _launch,
)
