"""The tables of resizes by way of whole matrices in float64: what they hold, without any bands."""

from __future__ import annotations

import numpy as np

from murf_fast.tables.gaussian import gaussian_radius, mirrored
from murf_fast.tables.resize import AxisTable


def axis(in_size, out_size, mode, antialias, via=None, scale_factor=None) -> AxisTable:
    if via is None:
        return table(matrix(in_size, out_size, mode, antialias, scale_factor))
    return table(matrix(via, out_size, mode, antialias) @ matrix(in_size, via, mode, antialias))


def transposed(of: AxisTable) -> AxisTable:
    return table(of.dense().T)


def gram(of: AxisTable) -> AxisTable:
    return table(of.dense().T @ of.dense())


def gaussian(size, sigma, border) -> AxisTable:
    radius = gaussian_radius(sigma)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    columns = mirrored(np.arange(size)[:, None] + np.arange(-radius, radius + 1), size, border)
    first = np.maximum(np.arange(size) - radius, 0)
    count = np.minimum(np.arange(size) + radius + 1, size) - first
    weights = np.zeros((size, int(count.max())))
    np.add.at(weights, (np.arange(size)[:, None], columns - first[:, None]), taps / taps.sum())
    return AxisTable(size, size, first.astype(np.int32), count.astype(np.int32), weights.astype(np.float32))


def matrix(in_size, out_size, mode, antialias, scale_factor=None) -> np.ndarray:
    step = in_size / out_size if scale_factor is None else 1.0 / scale_factor
    rows = np.arange(out_size)
    result = np.zeros((out_size, in_size))
    if mode in ("nearest", "nearest-exact"):
        # In float32, as torch computes these positions for results of up to 128 rows and columns together.
        offset = np.float32(0.5 if mode == "nearest-exact" else 0.0)
        position = ((rows.astype(np.float32) + offset) * np.float32(step)).astype(np.int64)
        if mode == "nearest" and out_size in (in_size, 2 * in_size):
            position = rows * in_size // out_size
        result[rows, np.minimum(position, in_size - 1)] = 1.0
    elif mode == "area":
        for i in rows:
            lo, hi = i * in_size // out_size, -((-(i + 1) * in_size) // out_size)
            result[i, lo:hi] = 1.0 / (hi - lo)
    elif antialias:
        _fill_antialiased(result, step, mode)
    elif mode == "bilinear":
        position = np.maximum(step * (rows + 0.5) - 0.5, 0.0)
        left = np.minimum(np.floor(position).astype(np.int64), in_size - 1)
        t = position - left
        np.add.at(result, (rows, left), 1.0 - t)
        np.add.at(result, (rows, np.minimum(left + 1, in_size - 1)), t)
    else:
        position = step * (rows + 0.5) - 0.5
        left = np.floor(position).astype(np.int64)
        for tap in range(-1, 3):
            weight = _keys(position - (left + tap), a=-0.75)
            np.add.at(result, (rows, np.clip(left + tap, 0, in_size - 1)), weight)
    return result


def _fill_antialiased(matrix: np.ndarray, step: float, mode: str) -> None:
    out_size, in_size = matrix.shape
    stretch = max(step, 1.0)
    support = (1.0 if mode == "bilinear" else 2.0) * stretch
    for i in range(out_size):
        center = step * (i + 0.5)
        lo = max(int(center - support + 0.5), 0)
        hi = min(int(center + support + 0.5), in_size)
        x = (np.arange(lo, hi) - center + 0.5) / stretch
        weight = np.maximum(1.0 - np.abs(x), 0.0) if mode == "bilinear" else _keys(x, a=-0.5)
        matrix[i, lo:hi] = weight / weight.sum()


def _keys(x: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def table(matrix: np.ndarray) -> AxisTable:
    out_size, in_size = matrix.shape
    used = matrix != 0
    # A transposed downsampling has unused rows: they get no taps, at the position of the row behind them.
    any_used = used.any(axis=1)
    start = np.where(any_used, used.argmax(axis=1), in_size - 1)
    # A leading zero weight may make a band start behind its successor's; widen it, kernels rely on the order.
    start = np.minimum.accumulate(start[::-1])[::-1]
    stop = np.where(any_used, in_size - used[:, ::-1].argmax(axis=1), start)
    count = stop - start
    columns = start[:, None] + np.arange(max(int(count.max(initial=0)), 1))
    inside = columns < stop[:, None]
    weights = np.where(inside, np.take_along_axis(matrix, np.minimum(columns, in_size - 1), axis=1), 0.0)
    return AxisTable(
        in_size,
        out_size,
        np.ascontiguousarray(start, dtype=np.int32),
        np.ascontiguousarray(count, dtype=np.int32),
        np.ascontiguousarray(weights, dtype=np.float32),
    )
