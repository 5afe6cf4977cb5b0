"""Nearest rows of a bank on a GPU: a matrix product whose epilogue keeps, per query and lane, the smallest distance.

Lane j of a split sees rows j, j + 128, ... A tile's distances become integers that order like them and whose lowest
bits name the tile, so that one minimum keeps value and place. What a lane gives up is remembered as one minimum per
query: when no candidate left behind can be nearer than the k-th exact distance, the answer is proven; the few other
queries are searched again, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch

__all__ = ["index_layout", "nearest_distance", "nearest_index"]

# Bits of a distance that give way to the tile's number. Rounding down by them is part of the bound.
TILE_BITS = 10
INFINITY = tl.constexpr(0x7F800000)  # float32's, as an integer
QUERIES = 16384
# Candidates per query that are scored exactly.
CANDIDATES = 32
# Elements of temporary float64 matrices: 64 MB.
ELEMENTS = 1 << 23
LARGEST_SQUARED_NORM = 1e36


@dataclass(frozen=True)
class ProductTile:
    """Queries times bank rows, ``depth`` columns at a time; warps, stages, and registers a thread at most."""

    queries: int
    rows: int
    depth: int
    warps: int
    stages: int
    registers: int


def product_tile(dtype: torch.dtype) -> ProductTile:
    """Half dtypes: 128 x 128 products and as many minima are 64 + 64 registers of each of 256 threads, which leaves
    room for the epilogue; three stages of 64 columns are 96 KB of shared memory. float32 runs without tensor cores.
    """
    if dtype == torch.float32:
        return ProductTile(64, 64, 32, 8, 2, 168)
    return ProductTile(128, 128, 64, 8, 3, 255)


def splits_of(queries: int, rows: int, tile: ProductTile) -> int:
    """Parts of the bank that are searched independently: enough programs for several waves on 132 multiprocessors,
    none with more tiles than their numbers have bits for, few enough that candidates stay few.
    """
    programs = -(-queries // tile.queries)
    tiles = -(-rows // tile.rows)
    wanted = max(-(-4 * 132 // programs), -(-tiles // (1 << TILE_BITS)))
    return max(1, min(wanted, tiles))


@triton.jit
def _nearest_distance(query, query_norms, bank, bank_norms, best_out, rest_out, queries, rows, split_rows, splits,
                      query_stride, bank_stride, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
                      BLOCK_D: tl.constexpr, TILE_BITS: tl.constexpr):  # fmt: skip
    # Programs that run together work on one split: they share its tiles in the second-level cache.
    q_tiles = tl.cdiv(queries, BLOCK_Q)
    split = tl.program_id(0) // q_tiles
    q = (tl.program_id(0) % q_tiles).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_inside = q < queries
    q_norm = tl.load(query_norms + q, mask=q_inside, other=0.0)
    begin = split.to(tl.int64) * split_rows
    end = tl.minimum(begin + split_rows, rows)
    best = tl.full([BLOCK_Q, BLOCK_M], INFINITY, dtype=tl.int32)
    rest = tl.full([BLOCK_Q], INFINITY, dtype=tl.int32)
    tile = 0
    while begin + tile * BLOCK_M < end:
        m = begin + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        m_inside = m < end
        products = tl.zeros([BLOCK_Q, BLOCK_M], dtype=tl.float32)
        # A constant width: the compiler overlaps loads with products only in loops of this form.
        for d in range(0, DIM, BLOCK_D):
            c = d + tl.arange(0, BLOCK_D)
            a = tl.load(query + (q * query_stride)[:, None] + c[None, :], mask=q_inside[:, None], other=0.0)
            b = tl.load(bank + (m * bank_stride)[None, :] + c[:, None], mask=m_inside[None, :], other=0.0)
            # Whatever torch allows: the bound that proves an answer counts the roundings of float32 sums
            # and no others. Who wants fewer digits asks for an index of bfloat16.
            products = tl.dot(a, b, products, input_precision="ieee")
        m_norm = tl.load(bank_norms + m, mask=m_inside, other=0.0)
        squared = tl.maximum(q_norm[:, None] + m_norm[None, :] - 2.0 * products, 0.0)
        packed = ((squared.to(tl.int32, bitcast=True) >> TILE_BITS) << TILE_BITS) | tile
        packed = tl.where(m_inside[None, :], packed, INFINITY)
        rest = tl.minimum(rest, tl.min(tl.maximum(best, packed), axis=1))
        best = tl.minimum(best, packed)
        tile += 1
    lanes = tl.arange(0, BLOCK_M)
    out = best_out + ((q * splits + split) * BLOCK_M)[:, None] + lanes[None, :]
    tl.store(out, best, mask=q_inside[:, None])
    tl.store(rest_out + q * splits + split, rest, mask=q_inside)


def nearest_index(bank: Tensor, cosine: bool, precision: str, device: torch.device) -> list[Tensor]:
    """[mean, scales, rounded rows, their squared norms, (largest error, largest norm)]; the rows stay with the bank."""
    dtype = torch.bfloat16 if precision == "auto" else getattr(torch, precision)
    rows, dim = bank.shape
    step = max(1, ELEMENTS // dim)
    total = torch.zeros(dim, dtype=torch.float64, device=device)
    scale = torch.empty(rows if cosine else 0, dtype=torch.float64, device=device)
    for begin in range(0, rows, step):
        part = bank[begin : begin + step].to(device).double()
        squares = part.square().sum(1)
        _check("bank", squares, begin, cosine)
        if cosine:
            scale[begin : begin + step] = squares.rsqrt()
            part = part * squares.rsqrt()[:, None]
        total += part.sum(0)
    mean = (total / rows).float()
    low = torch.empty(
        rows, _width(dim), dtype=dtype, device=bank.device, pin_memory=bank.device != device and device.type == "cuda"
    )
    norms = torch.empty(rows, dtype=torch.float32, device=device)
    limits = torch.zeros(2, dtype=torch.float64, device=device)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        rounded, squares, errors = _rounded(bank[part].to(device), mean, scale[part], dtype)
        low[part], norms[part] = rounded, squares.float()
        limits = torch.maximum(limits, torch.stack([errors.max(), squares.max()]))
    if not bool(limits.isfinite().all()):
        raise ValueError(
            f"murf_fast.nearest_distance: `bank` has entries that {precision} cannot hold; "
            'use precision="bfloat16" or "float32"'
        )
    return [mean, scale, low, norms, limits]


def index_layout(rows: int, dim: int) -> tuple[list, list]:
    """(dtype, shape) that the rounded rows of an index may have, and (shape, dtype) of what follows them."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return [(d, (rows, _width(dim))) for d in dtypes], [((rows,), torch.float32), ((2,), torch.float64)]


def nearest_distance(
    query: Tensor, bank: Tensor, index: list[Tensor], k: int, metric: str, distances: Tensor, indices: Tensor
) -> None:
    """Waits for the device: a query whose answer is not proven by the first pass takes a second one."""
    for begin in range(0, len(query), QUERIES):
        part = slice(begin, begin + QUERIES)
        squared, indices[part] = _search(query[part], begin, bank, index, k, metric == "cosine")
        distances[part] = {"l2": squared.sqrt(), "l2sq": squared, "cosine": squared / 2}[metric].float()


def _search(query: Tensor, first: int, bank: Tensor, index: list[Tensor], k: int, cosine: bool):
    mean, scale, low, norms, limits = index
    squares = query.double().square().sum(1)
    _check("query", squares, first, cosine)
    query_scale = squares.rsqrt() if cosine else squares[:0]
    rounded, squares, errors = _rounded(query, mean, query_scale, low.dtype)
    wanted = min(max(CANDIDATES, 2 * k), len(bank))
    values = torch.full((len(query), 0), torch.inf, dtype=torch.float32, device=query.device)
    places = torch.zeros((len(query), 0), dtype=torch.int64, device=query.device)
    rest = torch.full((len(query),), torch.inf, dtype=torch.float32, device=query.device)
    for begin, rows in _chunks(low, query.device):
        best, given_up = launch_nearest(rounded, squares.float(), rows, norms[begin : begin + len(rows)])
        rest = torch.minimum(rest, given_up)
        values, places, cut = _merge(values, places, *_decode(best, len(rows), begin), wanted)
        rest = torch.minimum(rest, cut)
    exact = _exact(query, query_scale, bank, scale, places).masked_fill(values.isinf(), torch.inf)
    squared, places = _smallest(exact, places, k)
    bounds = _Bounds(errors, squares, limits, bank.shape[1])
    open_ = (~(bounds.lower(rest.double()) > squared[:, -1].sqrt())).nonzero().flatten()
    for some in open_.split(256):
        bound = squared[some, -1].sqrt()
        squared[some], places[some] = _search_again(
            query[some], query_scale[some] if cosine else query_scale, rounded[some], squares[some],
            bounds.of(some), bound, bank, index, k,
        )  # fmt: skip
    return squared, places


class _Bounds:
    """Lower bounds of distances from squared distances between rounded rows."""

    def __init__(self, errors: Tensor, squares: Tensor, limits: Tensor, dim: int) -> None:
        self.errors = errors + limits[0]
        # The float32 sum of a product and the norms; tensor cores may truncate where IEEE rounds.
        self.absolute = (squares + limits[1]) * (4 * (dim + 8) * 2.0**-22)

    def of(self, some: Tensor) -> _Bounds:
        part = _Bounds.__new__(_Bounds)
        part.errors, part.absolute = self.errors[some], self.absolute[some]
        return part

    def lower(self, squared: Tensor) -> Tensor:
        return (squared - self.absolute).clamp(min=0).sqrt() * (1 - 2.0**-22) - self.errors


def launch_nearest(query: Tensor, query_norms: Tensor, rows: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    tile = product_tile(query.dtype)
    splits = splits_of(len(query), len(rows), tile)
    split_rows = triton.cdiv(triton.cdiv(len(rows), splits), tile.rows) * tile.rows
    best = torch.empty(len(query), splits, tile.rows, dtype=torch.int32, device=query.device)
    rest = torch.empty(len(query), splits, dtype=torch.int32, device=query.device)
    with launch.on_device_of(query):
        _nearest_distance[(triton.cdiv(len(query), tile.queries) * splits,)](
            query,
            query_norms,
            rows,
            norms,
            best,
            rest,
            len(query),
            len(rows),
            split_rows,
            splits,
            query.stride(0),
            rows.stride(0),
            DIM=query.shape[1],
            BLOCK_Q=tile.queries,
            BLOCK_M=tile.rows,
            BLOCK_D=tile.depth,
            TILE_BITS=TILE_BITS,
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.registers,
        )
    return (best, split_rows), _value(rest).amin(1)


def _decode(packed: tuple[Tensor, int], rows: int, begin: int) -> tuple[Tensor, Tensor]:
    best, split_rows = packed
    _, splits, lanes = best.shape
    integers = {"dtype": torch.int64, "device": best.device}
    starts = torch.arange(splits, **integers)[:, None] * split_rows
    places = starts + torch.arange(lanes, **integers) + (best & ((1 << TILE_BITS) - 1)).long() * lanes
    return _value(best).flatten(1), places.clamp(max=rows - 1).flatten(1) + begin


def _value(packed: Tensor) -> Tensor:
    return ((packed >> TILE_BITS) << TILE_BITS).view(torch.float32)


def _merge(values, places, more_values, more_places, wanted: int):
    """The ``wanted`` smallest of both, and the smallest value that is dropped."""
    values, places = torch.cat([values, more_values], 1), torch.cat([places, more_places], 1)
    if values.shape[1] <= wanted:
        return values, places, values.new_full((len(values),), torch.inf)
    smallest, order = values.topk(wanted + 1, largest=False)
    return smallest[:, :wanted], places.gather(1, order[:, :wanted]), smallest[:, wanted]


def _chunks(low: Tensor, device: torch.device):
    """Rows on the device: all of them, or one chunk after the other from host memory."""
    if low.device == device:
        yield 0, low
        return
    step = max(1, (256 << 20) // (low.shape[1] * low.element_size()))
    for begin in range(0, len(low), step):
        yield begin, low[begin : begin + step].to(device, non_blocking=True)


def _rounded(x: Tensor, mean: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Centred rows in ``dtype``, their squared norms, and their errors."""
    exact = x.double()
    if scale.numel():
        exact = exact * scale[:, None]
    exact = exact - mean.double()
    rounded = exact.float().to(dtype)
    squares, errors = rounded.double().square().sum(1), (exact - rounded.double()).square().sum(1).sqrt()
    return F.pad(rounded, (0, _width(x.shape[1]) - x.shape[1])), squares, errors


def _width(dim: int) -> int:
    """Columns of rounded rows, filled up with zeros: aligned rows, and no mask in the kernel's inner loop. Masked
    columns at unaligned addresses spilled registers when compiled for sm_90."""
    return triton.cdiv(dim, 64) * 64


def _exact(query: Tensor, query_scale: Tensor, bank: Tensor, scale: Tensor, places: Tensor) -> Tensor:
    """Squared distances by direct differences in float64: (Q, n) for places (Q, n)."""
    result = torch.empty(places.shape, dtype=torch.float64, device=query.device)
    step = max(1, ELEMENTS // max(1, places.shape[1] * query.shape[1]))
    for begin in range(0, len(query), step):
        part = slice(begin, begin + step)
        flat = places[part].flatten()
        rows = bank.index_select(0, flat.to(bank.device)).to(query.device).double().view(*places[part].shape, -1)
        q = query[part].double()
        if scale.numel():
            rows, q = rows * scale[flat].view(*places[part].shape, 1), q * query_scale[part][:, None]
        result[part] = (q[:, None] - rows).square().sum(2)
    return result


def _smallest(squared: Tensor, places: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest, equal ones by rising place."""
    by_place = places.argsort(1)
    squared, places = squared.gather(1, by_place), places.gather(1, by_place)
    squared, order = squared.sort(dim=1, stable=True)
    return squared[:, :k], places.gather(1, order[:, :k])


def _search_again(query, query_scale, rounded, squares, bounds, bound, bank, index, k):
    """Scores every row that may be as near as ``bound``, the distance of the k-th row found so far."""
    _, scale, low, norms, _ = index
    found = torch.full((len(query), k), torch.inf, dtype=torch.float64, device=query.device)
    places = torch.full((len(query), k), len(low), dtype=torch.int64, device=query.device)
    step = max(1, ELEMENTS // max(len(query), query.shape[1]))
    for begin in range(0, len(low), step):
        rows = low[begin : begin + step].to(query.device).double()
        d = squares[:, None] + norms[begin : begin + step].double() - 2 * rounded.double() @ rows.T
        lower = (d - bounds.absolute[:, None]).clamp(min=0).sqrt() * (1 - 2.0**-22) - bounds.errors[:, None]
        exact = torch.full_like(d, torch.inf)
        i, j = (lower <= bound[:, None]).nonzero(as_tuple=True)
        for pairs in torch.arange(len(i), dtype=torch.int64, device=i.device).split(4096):
            some = query_scale[i[pairs]] if len(query_scale) else query_scale
            exact[i[pairs], j[pairs]] = _exact(query[i[pairs]], some, bank, scale, j[pairs][:, None] + begin)[:, 0]
        everything = torch.arange(begin, begin + len(rows), dtype=torch.int64, device=query.device)
        everything = everything.expand(len(query), -1)
        found, places = _smallest(torch.cat([found, exact], 1), torch.cat([places, everything], 1), k)
    return found, places


def _check(name: str, squares: Tensor, first: int, nonzero: bool) -> None:
    wrong = (~(squares <= LARGEST_SQUARED_NORM)).nonzero().flatten() + first
    if len(wrong):
        rows = wrong.tolist()
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise ValueError(
            f"murf_fast.nearest_distance: `{name}` must be finite with norms up to 1e18, rows {rows[:5]}{more} are not"
        )
    if nonzero and bool((squares == 0).any()):
        zero = ((squares == 0).nonzero().flatten()[:5] + first).tolist()
        raise ValueError(f'murf_fast.nearest_distance: metric="cosine" needs nonzero rows, `{name}` has {zero}')
