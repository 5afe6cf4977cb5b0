"""The CPU search behind ``nearest_distance``: blocks of one matrix product, each reduced before the next is made.

A prepared row is rounded to the product's dtype and followed by six columns that hold its squared norm, so that the
product itself is ``-d^2 / 2`` between rounded rows. csrc/level/nearest_distance.cpp says what happens to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import _fork
from murf_fast.native import _nearest_kernels as kernels
from murf_fast.native._address import empty, extension

__all__ = ["has_bf16_products", "index_layout", "nearest_distance", "nearest_index"]

# A block of products is 4 MB in bfloat16 and 8 MB in float32: it is read again at once, from the last-level cache.
# Larger blocks did not raise the rate of the products.
BANK_BLOCK = 1024
QUERY_BLOCK = 2048
# The bank is read once for so many queries. Their candidates are 13 MB.
QUERIES = 8192
CANDIDATES = 128
# Beyond this, squares are near the end of float32.
LARGEST_SQUARED_NORM = 1e36
# Unit roundoff of a rounding to bfloat16 with room; results in float32 are covered by the bound of the sum.
BFLOAT16_ROUNDING = 2.0**-7


def has_bf16_products() -> bool:
    """Whether this processor multiplies matrices in bfloat16 faster than in float32."""
    return extension.has_bf16_products()


def _resolved(precision: str) -> torch.dtype:
    """The dtype of the bank's copy; float32 stands for none."""
    if precision == "auto":
        return torch.bfloat16 if has_bf16_products() else torch.float32
    return getattr(torch, precision)


def nearest_index(bank: Tensor, cosine: bool, precision: str, device: torch.device) -> list[Tensor]:
    """[mean (D,), row scales (R,), low-precision rows (R, D or more), errors per block, squared norms per block];
    unused ones are empty. The device is the bank's.
    """
    with _fork.calling_thread_only():
        return _prepared(bank, cosine, precision)


def _prepared(bank: Tensor, cosine: bool, precision: str) -> list[Tensor]:
    dtype = _resolved(precision)
    rows, dim = bank.shape
    mean, scale = _statistics(bank, cosine)
    blocks = -(-rows // BANK_BLOCK)
    errors, squares = _zeros(blocks), _zeros(blocks)
    low = empty((0, 0), dtype)
    if dtype != torch.float32:
        # Only rows that go into a product as they are carry its columns.
        product_ready = dtype == torch.bfloat16 and has_bf16_products()
        low = empty((rows, _width(dim) if product_ready else dim), dtype)
        role = "bank" if product_ready else "plain"
        for i, begin in enumerate(range(0, rows, BANK_BLOCK)):
            part = slice(begin, begin + BANK_BLOCK)
            norm, error = kernels.prepare(bank[part], mean, _part(scale, part), low[part], role)
            if not bool(norm.isfinite().all()):
                raise ValueError(
                    f"murf_fast.nearest_distance: `bank` has entries that {precision} cannot hold; "
                    'use precision="bfloat16" or "float32"'
                )
            errors[i], squares[i] = error.max(), norm.max()
    return [mean, scale, low, errors, squares]


def index_layout(rows: int, dim: int) -> tuple[list, list]:
    """(dtype, shape) that the low-precision rows of an index may have, and (shape, dtype) of the errors and norms."""
    half = (torch.bfloat16, torch.float16)
    lows = [(torch.float32, (0, 0)), (torch.bfloat16, (rows, _width(dim))), *((d, (rows, dim)) for d in half)]
    return lows, [((-(-rows // BANK_BLOCK),), torch.float64)] * 2


def nearest_distance(
    query: Tensor, bank: Tensor, index: list[Tensor], k: int, metric: str, distances: Tensor, indices: Tensor
) -> None:
    """The ``k`` rows of ``bank`` (R, D) nearest to every row of ``query`` (Q, D): ``distances`` (Q, k) float32 and
    ``indices`` (Q, k) int64.
    """
    cosine = metric == "cosine"
    for begin in range(0, len(query), QUERIES):
        part = slice(begin, begin + QUERIES)
        scale = _norms_to_scale(_squared_norms(query[part], "query", begin, cosine)) if cosine else _empty()
        _search(query[part], scale, begin, bank, index, k, metric, distances[part], indices[part])


def _search(query, query_scale, query_begin, bank, index, k, metric, distances, indices) -> None:
    mean, bank_scale, low, errors, squares = index
    width = _width(bank.shape[1])
    product_ready = low.shape[1] == width
    rows_dtype = torch.bfloat16 if product_ready or not _float32_products_are_exact() else torch.float32
    prepared = empty((len(query), width), rows_dtype)
    query_squares, query_errors = kernels.prepare(query, mean, query_scale, prepared, "query")
    _check_rows("query", query_squares, query_begin)
    state = kernels.State(len(query), k, max(CANDIDATES, 4 * k))
    rows_at_a_time = min(BANK_BLOCK, len(bank))
    block = None if product_ready else empty((rows_at_a_time, width), rows_dtype)
    product = empty((min(QUERY_BLOCK, len(query)), rows_at_a_time), rows_dtype)
    for i, begin in enumerate(range(0, len(bank), BANK_BLOCK)):
        part = slice(begin, begin + BANK_BLOCK)
        if product_ready:
            rows, error, square = low[part], float(errors[i]), float(squares[i])
        else:
            rows = block[: len(bank[part])]
            if low.numel():
                norm, own = kernels.prepare(low[part], None, _empty(), rows, "bank")
            else:
                norm, own = kernels.prepare(bank[part], mean, _part(bank_scale, part), rows, "bank")
            error, square = float(errors[i] + own.max()), float(norm.max())
        for first in range(0, len(query), QUERY_BLOCK):
            some = slice(first, first + QUERY_BLOCK)
            out = _product(prepared[some], rows, product)
            kernels.scan(
                out,
                begin,
                (query_errors[some], query_squares[some]),
                (error, square),
                # A sum of terms of at most |q|^2 + |b|^2 together; twice a product; bfloat16 instructions round pairs.
                absolute=2 * 2 * width * 2.0**-24 * (1 + 2.0**-10),
                relative=BFLOAT16_ROUNDING if rows_dtype == torch.bfloat16 else 2.0**-22,
                query=(query[some], _part(query_scale, some)),
                bank=(bank, bank_scale),
                state=state.part(some),
            )
    kernels.finish((query, query_scale), (bank, bank_scale), state, metric, distances, indices)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b.T, in a reused block where torch has a way to say so."""
    if a.dtype == torch.float32 and _has_onednn_linear():
        # oneDNN uses AVX-512 on every processor that has it; torch.mm takes MKL, which on AMD was half as fast.
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return torch.mm(a, b.T, out=out.flatten()[: len(a) * len(b)].view(len(a), len(b)))


def _has_onednn_linear() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _float32_products_are_exact() -> bool:
    """Whether torch computes float32 products in float32. Where users allow less, rows are rounded to bfloat16 first,
    which any such product holds exactly, so that the bounds stay true."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        return torch.get_float32_matmul_precision() == "highest"
    return matmul.fp32_precision in ("none", "ieee")


def _statistics(bank: Tensor, cosine: bool) -> tuple[Tensor, Tensor]:
    """The mean row (of unit rows, for cosine) and the scales that make unit rows."""
    squares = _squared_norms(bank, "bank", 0, cosine)
    scale = _norms_to_scale(squares) if cosine else _empty()
    total = _zeros(bank.shape[1])
    for begin in range(0, len(bank), BANK_BLOCK):
        part = slice(begin, begin + BANK_BLOCK)
        rows = bank[part].float()
        if cosine:
            # In float64, as scales of rows near the smallest numbers are beyond float32.
            rows = rows * scale[part][:, None]
        total += rows.sum(0, dtype=torch.float64)
    return (total / len(bank)).float(), scale


def _squared_norms(x: Tensor, name: str, first: int, nonzero: bool) -> Tensor:
    """Checks the rows."""
    squares = empty((len(x),), torch.float64)
    block = empty((min(BANK_BLOCK, len(x)), x.shape[1]), torch.float32)
    for begin in range(0, len(x), BANK_BLOCK):
        part = slice(begin, begin + BANK_BLOCK)
        squares[part] = kernels.prepare(x[part], None, _empty(), block[: len(x[part])], "plain")[0]
    _check_rows(name, squares, first)
    if nonzero and bool((squares == 0).any()):
        zero = (squares == 0).nonzero().flatten()[:5] + first
        raise ValueError(
            f'murf_fast.nearest_distance: metric="cosine" needs nonzero rows, `{name}` has {zero.tolist()}'
        )
    return squares


def _check_rows(name: str, squared_norms: Tensor, first: int) -> None:
    wrong = ~(squared_norms <= LARGEST_SQUARED_NORM)
    if bool(wrong.any()):
        rows = (wrong.nonzero().flatten() + first).tolist()
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise ValueError(
            f"murf_fast.nearest_distance: `{name}` must be finite with norms up to 1e18, rows {rows[:5]}{more} are not"
        )


def _norms_to_scale(squared_norms: Tensor) -> Tensor:
    return squared_norms.rsqrt()


def _width(dim: int) -> int:
    return (dim + 6 + 7) // 8 * 8


def _part(scale: Tensor, part: slice) -> Tensor:
    return scale[part] if scale.numel() else scale


def _empty() -> Tensor:
    return _zeros(0)


def _zeros(count: int) -> Tensor:
    return empty((count,), torch.float64).zero_()
