"""Every interpolation of the field as one separable banded matrix per axis.

``Y = U_h X U_w^T``: bilinear, bicubic, both antialiased filters, area (adaptive average pooling) and nearest differ
only in the entries of ``U``; two chained resizes are the product of two such matrices, and a gradient is the
transposed one. :func:`axis` builds ``U`` once in float64, block of rows by block of rows and never as a full matrix,
and keeps it as a table (first index, tap count, weights); every kernel of the library walks these tables.

The rules are those of ``torch.nn.functional.interpolate`` with ``align_corners=False``. ``size=`` and
``scale_factor=`` differ: with a factor ``f`` the output has ``floor(n * f)`` pixels and the sampling step is ``1 / f``,
not ``n / floor(n * f)``; an axis that keeps its size is copied by the bilinear and the antialiased filters.

Where the rounding of a position decides which pixel a nearest mode reads, the table reads the one that torch's CPU
kernels for contiguous float32, bfloat16 and float16 maps read. There are two, one for results of at most 128 rows and
columns together, which also takes no notice of a factor on an axis that ``nearest`` keeps or doubles, and one for all
others (``large``). Torch's channels_last kernel for four channels and more is the former at every size, and differs
from ours at, say, 2 to 141 pixels; torch on a processor without fused multiplications, on CUDA and in float64 rounds
in other ways again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from murf_fast.annotations import Mode
from murf_fast.tables._table import Table

MODES = ("bilinear", "bicubic", "area", "nearest", "nearest-exact")
ANTIALIASED = ("bilinear", "bicubic")
NEAREST = ("nearest", "nearest-exact")

MAX_PIXELS = 2**31 - 1  # of an axis: indices are int32
MAX_WEIGHTS = 2**28  # of a table: 1 GiB
BLOCK = 2**17  # weights that are computed at a time
_SMALL_RESULT = 128  # rows and columns together; torch's threshold

# Consecutive rows of a banded matrix: the first row's number, every row's first column, and (rows, width) weights.
Block = tuple[int, np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class AxisTable(Table):
    """One axis of a resize: row ``i`` of ``U`` is ``weights[i, :count[i]]`` at columns ``first[i], first[i] + 1, ...``.

    ``first`` never decreases, and ``weights`` beyond ``count`` are zero. Instances come from :func:`axis`, are cached
    and must not be modified.
    """

    in_size: int
    out_size: int
    first: np.ndarray  # (out_size,) int32
    count: np.ndarray  # (out_size,) int32
    weights: np.ndarray  # (out_size, taps) float32

    @property
    def taps(self) -> int:
        return self.weights.shape[1]

    def dense(self) -> np.ndarray:
        """The matrix ``U`` in float64 (with the table's float32 weights)."""
        matrix = np.zeros((self.out_size, self.in_size))
        for i in range(self.out_size):
            n = int(self.count[i])
            matrix[i, self.first[i] : self.first[i] + n] = self.weights[i, :n]
        return matrix

    @cached_property
    def transposed(self) -> AxisTable:
        """The table of ``U^T``: for every input index the outputs that read it (a gather, hence deterministic)."""
        return _transposed(self)

    def device_arrays(self) -> tuple[np.ndarray, ...]:
        return self.first, self.count, self.weights


@lru_cache(maxsize=1024)
def part(table: AxisTable, begin: int, end: int) -> tuple[int, AxisTable]:
    """Rows ``begin .. end - 1`` of ``U``: the first column they need, and the table of those up to the last."""
    first, count = table.first[begin:end], table.count[begin:end]
    low, high = int(first.min()), int((first + count).max())
    weights = np.ascontiguousarray(table.weights[begin:end])
    return low, AxisTable(high - low, end - begin, first - np.int32(low), np.ascontiguousarray(count), weights)


@lru_cache(maxsize=4096)
def axis(
    in_size: int,
    out_size: int,
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: int | None = None,
    scale_factor: float | None = None,
    large: bool = False,
    large_via: bool = False,
) -> AxisTable:
    """Table of one axis, ``in_size -> out_size`` pixels, or ``in_size -> via -> out_size`` in two chained resizes.

    With ``scale_factor`` the sampling step is ``1 / scale_factor`` instead of ``in_size / out_size``. ``large`` and
    ``large_via``: what :func:`is_large` says of the result and of the map in between.

    Raises ValueError for an axis beyond int32 indices, and for a chain that is no band: after a resize to a few pixels
    and back, every pixel depends on thousands.

    Memory: twice the table (12 to 24 bytes per output pixel in the usual modes) while it is built.
    """
    if via is None:
        return _collected(in_size, out_size, _blocks(in_size, out_size, mode, antialias, scale_factor, large))
    if scale_factor is not None:
        raise ValueError("murf_fast: `via` and `scale_factor` exclude each other")
    first = list(_blocks(in_size, via, mode, antialias, None, large_via))
    second = _blocks(via, out_size, mode, antialias, None, large)
    return _collected(in_size, out_size, _product(second, _joined(first), in_size, out_size))


@lru_cache(maxsize=1024)
def gram_axis(
    in_size: int,
    out_size: int,
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: int | None = None,
    large: bool = False,
    large_via: bool = False,
) -> AxisTable:
    """Table of the symmetric ``U^T U`` of :func:`axis`: second moments of a resized map without resizing it."""
    table = axis(in_size, out_size, mode, antialias, via, None, large, large_via)
    taps = table.taps
    width = 2 * taps - 1  # row j holds columns j - taps + 1 .. j + taps - 1
    check_weights(in_size, width, f"`size`: the second moments of {in_size} pixels resized to {out_size}")
    gram = np.zeros((in_size + taps, width))  # rows that only zero weights point to lie behind the last
    for begin, end in parts(out_size, taps * taps):
        rows = table.weights[begin:end].astype(np.float64)
        a, b = np.arange(taps)[:, None], np.arange(taps)
        target = table.first[begin:end, None, None].astype(np.int64) + a
        np.add.at(gram, (target, b - a + taps - 1), rows[:, :, None] * rows[:, None, :])
    start = np.arange(in_size) - taps + 1
    # Columns before the first and behind the last hold zeros.
    return _collected(in_size, in_size, [(b, start[b:e], gram[b:e]) for b, e in parts(in_size, width)])


@lru_cache(maxsize=256)
def pseudo_inverse(in_size: int, out_size: int, mode: str, antialias: bool) -> np.ndarray:
    """(in_size, out_size) pseudo-inverse of one axis, in float64: what undoes a resize."""
    matrix = np.zeros((out_size, in_size))
    for begin, start, weights in _blocks(in_size, out_size, mode, antialias, None, False):
        rows, columns = np.nonzero(weights)
        matrix[begin + rows, start[rows] + columns] = weights[rows, columns]
    return np.linalg.pinv(matrix)


def scaled_size(in_size: int, scale_factor: float) -> int:
    """Pixels that ``F.interpolate(scale_factor=...)`` gives an axis."""
    return math.floor(in_size * scale_factor)


def is_large(mode: str, size: tuple[int, int] | list[int]) -> bool:
    """Whether torch takes its kernel of large results for a map of ``size``; only the nearest modes tell."""
    return mode in NEAREST and size[0] + size[1] > _SMALL_RESULT


def _blocks(
    in_size: int, out_size: int, mode: str, antialias: bool, scale_factor: float | None, large: bool
) -> Iterator[Block]:
    """The rows of one resize, in blocks."""
    if antialias and mode not in ANTIALIASED:
        raise ValueError(f"murf_fast: `antialias` needs mode in {ANTIALIASED}, got {mode!r}")
    if mode not in MODES:
        raise ValueError(f"murf_fast: `mode` must be one of {MODES}, got {mode!r}")
    if max(in_size, out_size) > MAX_PIXELS:
        raise ValueError(f"murf_fast: an axis must have at most {MAX_PIXELS} pixels, got {in_size} to {out_size}")
    if in_size == out_size and (antialias or mode == "bilinear"):
        scale_factor = None  # torch copies such an axis, although the step is not one
    step = in_size / out_size if scale_factor is None else 1.0 / scale_factor
    if antialias:
        width = 2 * int((1.0 if mode == "bilinear" else 2.0) * max(step, 1.0)) + 2
    else:
        width = {"bilinear": 2, "bicubic": 4, "area": in_size // out_size + 2}.get(mode, 1)
    for begin, end in parts(out_size, width):
        rows = np.arange(begin, end)
        if antialias:
            start, weights = _antialiased(rows, in_size, step, mode)
        elif mode == "bilinear":
            start, weights = _bilinear(rows, in_size, step)
        elif mode == "bicubic":
            start, weights = _bicubic(rows, in_size, step)
        elif mode == "area":
            start, weights = _area(rows, in_size, out_size)
        else:
            unscaled = mode == "nearest" and out_size in (in_size, 2 * in_size) and (scale_factor is None or not large)
            start = rows * in_size // out_size if unscaled else _nearest(rows, step, mode == "nearest-exact", large)
            start, weights = np.minimum(start, in_size - 1), np.ones((len(rows), 1))
        yield begin, start, weights


def _nearest(rows: np.ndarray, step: float, exact: bool, large: bool) -> np.ndarray:
    """Pixels read, by the arithmetic of torch's kernels: one rounding moves a whole pixel."""
    step = np.float32(step)
    if not exact:
        return (rows.astype(np.float32) * step).astype(np.int64)
    center = rows + 0.5
    if not large:
        return (center * np.float64(step)).astype(np.float32).astype(np.int64)
    # A fused multiplication and subtraction, as the product of two float32 is exact in float64.
    position = (center.astype(np.float32).astype(np.float64) * step - 0.5).astype(np.float32)
    return (np.maximum(position, 0.0) + 0.5).astype(np.float32).astype(np.int64)


def _bilinear(rows: np.ndarray, in_size: int, step: float) -> tuple[np.ndarray, np.ndarray]:
    position = np.maximum(step * (rows + 0.5) - 0.5, 0.0)
    left = np.minimum(np.floor(position).astype(np.int64), in_size - 1)
    t = position - left
    weights = np.stack([1.0 - t, t], axis=1)
    last = left == in_size - 1
    weights[last, 0] += t[last]
    weights[last, 1] = 0.0
    return left, weights


def _bicubic(rows: np.ndarray, in_size: int, step: float) -> tuple[np.ndarray, np.ndarray]:
    position = step * (rows + 0.5) - 0.5
    left = np.floor(position).astype(np.int64)
    start = np.clip(left - 1, 0, in_size - 1)
    weights, at = np.zeros((len(rows), 4)), np.arange(len(rows))
    for tap in range(-1, 3):
        weights[at, np.clip(left + tap, 0, in_size - 1) - start] += _keys(position - (left + tap), a=-0.75)
    return start, weights


def _area(rows: np.ndarray, in_size: int, out_size: int) -> tuple[np.ndarray, np.ndarray]:
    start, stop = rows * in_size // out_size, -((-(rows + 1) * in_size) // out_size)
    count = (stop - start)[:, None]
    return start, np.where(np.arange(count.max()) < count, 1.0 / count, 0.0)


def _antialiased(rows: np.ndarray, in_size: int, step: float, mode: str) -> tuple[np.ndarray, np.ndarray]:
    stretch = max(step, 1.0)
    support = (1.0 if mode == "bilinear" else 2.0) * stretch
    center = step * (rows + 0.5)
    start = np.maximum((center - support + 0.5).astype(np.int64), 0)
    count = np.minimum((center + support + 0.5).astype(np.int64), in_size) - start
    weights = np.zeros((len(rows), count.max()))
    for n in np.unique(count):  # rows of one length at a time: a few, and their sums take every weight in one order
        of = np.flatnonzero(count == n)
        x = (start[of, None] + np.arange(n) - center[of, None] + 0.5) / stretch
        weight = np.maximum(1.0 - np.abs(x), 0.0) if mode == "bilinear" else _keys(x, a=-0.5)
        weights[of, :n] = weight / weight.sum(axis=1, keepdims=True)
    return start, weights


def _keys(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel. ``a`` is -0.75 without antialiasing and -0.5 with it (as in Pillow)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def parts(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose bands of ``width`` weights make one block."""
    step = max(1, BLOCK // max(width, 1))
    return ((begin, min(begin + step, rows)) for begin in range(0, rows, step))


def _joined(blocks: list[Block]) -> tuple[np.ndarray, np.ndarray]:
    """All first columns and all weights, those of narrow blocks padded with zeros."""
    width = max(weights.shape[1] for _, _, weights in blocks)
    padded = [np.pad(weights, ((0, 0), (0, width - weights.shape[1]))) for _, _, weights in blocks]
    return np.concatenate([start for _, start, _ in blocks]), np.concatenate(padded)


def _product(
    left: Iterator[Block], right: tuple[np.ndarray, np.ndarray], in_size: int, out_size: int
) -> Iterator[Block]:
    """The rows of the product of two banded matrices; sums run over the columns of ``left`` in order."""
    right_start, right_weights = right
    for begin, left_start, left_weights in left:
        rows, taps = left_weights.shape
        source = np.minimum(left_start[:, None] + np.arange(taps), len(right_start) - 1)  # beyond: weights of zero
        start = right_start[left_start]
        offset = right_start[source] - start[:, None]
        width = int(offset.max()) + right_weights.shape[1]
        check_weights(out_size, width, f"`via`: {in_size} pixels resized by way of {len(right_start)} to {out_size}")
        for part_begin, part_end in parts(rows, width):
            part = slice(part_begin, part_end)
            weights = np.zeros((part_end - part_begin, width))
            at, columns = np.arange(part_end - part_begin)[:, None], np.arange(right_weights.shape[1])
            for tap in range(taps):
                term = left_weights[part, tap, None] * right_weights[source[part, tap]]
                weights[at, offset[part, tap, None] + columns] += term
            yield begin + part_begin, start[part], weights


def check_weights(rows: int, width: int, what: str) -> None:
    if rows * width > MAX_WEIGHTS:
        raise ValueError(
            f"murf_fast: {what} depend on up to {width} pixels each: a table of {rows * width * 4 / 2**30:.1f} GiB, "
            f"more than the {MAX_WEIGHTS * 4 // 2**30} GiB that a table may have"
        )


def _collected(in_size: int, out_size: int, blocks: Iterator[Block] | list[Block]) -> AxisTable:
    """A table of the rows of ``blocks``, every band cut to its nonzero weights."""
    first, stop = np.empty(out_size, np.int32), np.empty(out_size, np.int32)
    kept = []
    for begin, start, weights in blocks:
        width, rows = weights.shape[1], slice(begin, begin + len(start))
        used = weights != 0
        any_used = used.any(axis=1)
        # A transposed downsampling has unused rows: they get no taps, at the position of the row behind them.
        first[rows] = np.where(any_used, start + used.argmax(axis=1), in_size - 1)
        stop[rows] = np.where(any_used, start + width - used[:, ::-1].argmax(axis=1), 0)
        kept.append((rows, start.astype(np.int32), weights.astype(np.float32)))
    # A leading zero weight may make a band start behind its successor's; widen it, kernels rely on the order.
    first = np.minimum.accumulate(first[::-1])[::-1].copy()
    count = np.maximum(stop - first, 0)
    taps = max(int(count.max(initial=0)), 1)
    result = np.zeros((out_size, taps), np.float32)
    for rows, start, weights in kept:
        column = (first[rows] - start)[:, None] + np.arange(taps)
        inside = (column >= 0) & (column < weights.shape[1]) & (np.arange(taps) < count[rows, None])
        result[rows] = np.where(inside, np.take_along_axis(weights, np.clip(column, 0, weights.shape[1] - 1), 1), 0)
    return AxisTable(in_size, out_size, first, count, result)


def _transposed(table: AxisTable) -> AxisTable:
    def entries() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for begin, end in parts(table.out_size, table.taps):
            weights = table.weights[begin:end]
            rows, taps = np.nonzero(weights)
            yield begin + rows, table.first[begin + rows] + taps, weights[rows, taps]

    first = np.full(table.in_size, table.out_size - 1, np.int64)
    stop = np.zeros(table.in_size, np.int64)
    for rows, columns, _ in entries():
        np.minimum.at(first, columns, rows)
        np.maximum.at(stop, columns, rows + 1)
    first = np.minimum.accumulate(first[::-1])[::-1]
    count = np.maximum(stop - first, 0)
    taps = max(int(count.max(initial=0)), 1)
    result = np.zeros((table.in_size, taps), np.float32)
    for rows, columns, weights in entries():
        result[columns, rows - first[columns]] = weights
    return AxisTable(table.out_size, table.in_size, first.astype(np.int32), count.astype(np.int32), result)
