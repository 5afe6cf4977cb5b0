"""Resize, padding and kernel taps of one axis composed into one table: what an adaptive convolution reads.

Tap ``i`` of output ``y`` reads padded row ``y + i`` of the resized map, which is a short run of rows of the source:
``A_y = U[pad(y + i - r)]``, a matrix (taps, window). A kernel ``K`` on the resized map is then ``A_y^T K A_x`` on the
source. At a doubling with seven taps that is 7 x 7 pixels for bicubic and 5 x 5 for bilinear; at a tripling bilinear
needs 4 x 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from murf_fast.tables._table import Table
from murf_fast.tables.resize import axis

PADDINGS = ("reflect", "replicate", "constant")
_VECTOR = 8  # the kernels work on whole vectors of window weights


@dataclass(frozen=True, eq=False)
class FoldedAxis(Table):
    """Output ``i`` reads inputs ``first[i], ..., first[i] + count[i] - 1``; tap ``t`` with ``weights[i, t]``.

    Input ``j`` is read by outputs from ``reader_begin[j]`` up to and without ``reader_end[j]``. Instances come from
    :func:`folded_axis`, are cached and must not be modified.
    """

    in_size: int
    out_size: int
    first: np.ndarray  # (out_size,) int32
    count: np.ndarray  # (out_size,) int32
    weights: np.ndarray  # (out_size, taps, window) float32
    reader_begin: np.ndarray  # (in_size,) int32
    reader_end: np.ndarray  # (in_size,) int32

    @property
    def taps(self) -> int:
        return self.weights.shape[1]

    @cached_property
    def window(self) -> int:
        """Inputs that an output reads at most; ``weights`` may hold a few more zeros."""
        return int(self.count.max())

    @cached_property
    def is_shift(self) -> bool:
        """Whether tap ``t`` of output ``i`` is input ``i + t`` and nothing else: neither resize nor padding."""
        return (
            self.in_size == self.out_size + self.taps - 1
            and np.array_equal(self.first, np.arange(self.out_size))
            and bool((self.weights[:, :, : self.taps] == np.eye(self.taps)).all())
        )

    def device_arrays(self) -> tuple[np.ndarray, ...]:
        """``(first, end, weights, reader_begin, reader_end)``: from ``first[i]`` up to and without ``end[i]``."""
        return self.first, self.first + self.count, self.weights, self.reader_begin, self.reader_end


@lru_cache(maxsize=256)
def folded_axis(in_size: int, out_size: int, taps: int, mode: str | None, padding: str | None) -> FoldedAxis:
    """Table of ``in_size`` pixels, resized by ``mode`` (None: not), padded (None: not), read by ``taps`` taps.

    With padding the resized axis has ``out_size`` pixels, without it ``out_size + taps - 1``.
    """
    radius = taps // 2
    resized = out_size if padding else out_size + taps - 1
    position = np.arange(out_size)[:, None] + np.arange(taps) - (radius if padding else 0)
    inside = (position >= 0) & (position < resized)
    if padding == "reflect":
        position = np.abs(position)
        position = (resized - 1) - np.abs((resized - 1) - position)
    position = np.clip(position, 0, resized - 1)
    if mode is None:
        first, count, rows = np.arange(resized), np.ones(resized, np.int64), np.ones((resized, 1))
    else:
        table = axis(in_size, resized, mode)
        first, count, rows = table.first, table.count, table.weights

    begin, end = first[position], first[position] + count[position]
    used = inside if padding == "constant" else np.ones_like(inside)
    low = np.where(used, begin, in_size).min(1)
    high = np.where(used, end, 0).max(1)
    span = int((high - low).max())
    weights = np.zeros((out_size, taps, -(-span // _VECTOR) * _VECTOR), np.float32)
    y, i = np.nonzero(used)
    for t in range(rows.shape[1]):
        valid = t < count[position[y, i]]
        yy, ii = y[valid], i[valid]
        weights[yy, ii, begin[yy, ii] - low[yy] + t] = rows[position[yy, ii], t]

    reader_begin, reader_end = np.full(in_size, out_size, np.int32), np.zeros(in_size, np.int32)
    for t in range(span):
        readers = np.flatnonzero(low + t < high)
        np.minimum.at(reader_begin, low[readers] + t, readers.astype(np.int32))
        np.maximum.at(reader_end, low[readers] + t, readers.astype(np.int32) + 1)
    return FoldedAxis(
        in_size, out_size, low.astype(np.int32), (high - low).astype(np.int32), weights, reader_begin, reader_end
    )


@lru_cache(maxsize=256)
def part(table: FoldedAxis, begin: int, end: int) -> FoldedAxis:
    """Outputs ``begin .. end - 1`` alone, of the same inputs."""
    if (begin, end) == (0, table.out_size):
        return table
    readers = (np.clip(of - begin, 0, end - begin).astype(np.int32) for of in (table.reader_begin, table.reader_end))
    first, count, weights = (np.ascontiguousarray(of[begin:end]) for of in (table.first, table.count, table.weights))
    return FoldedAxis(table.in_size, end - begin, first, count, weights, *readers)
