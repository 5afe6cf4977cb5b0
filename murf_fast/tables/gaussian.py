"""Gaussian filters as banded matrices: a table of one axis with the border's taps folded back into the band."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from murf_fast.tables.resize import BLOCK, AxisTable, check_weights, parts


@lru_cache(maxsize=256)
def gaussian_axis(size: int, sigma: float, border: str) -> AxisTable:
    """Table of a Gaussian filter, cut off at four sigma. Taps beyond the border fold back into the row's own band.

    Raises ValueError where a row's band and the axis are so long that the table would pass 1 GiB.
    """
    radius = gaussian_radius(sigma)
    first = np.maximum(np.arange(size) - radius, 0)
    count = np.minimum(np.arange(size) + radius + 1, size) - first
    width = int(count.max())
    check_weights(size, width, f"`sigma`: {sigma:g} pixels on an axis of {size}")
    offset, taps = gaussian_taps(size, sigma, border)
    weights = np.zeros((size, width), np.float32)
    if radius < size - radius:
        weights[radius : size - radius] = taps
    borders = np.flatnonzero((np.arange(size) < radius) | (np.arange(size) >= size - radius))
    for begin, end in parts(len(borders), max(len(taps), width)):
        rows = borders[begin:end, None]
        columns = mirrored(rows + offset + np.arange(len(taps)), size, border)
        band = np.zeros((end - begin, width))
        np.add.at(band, (np.arange(end - begin)[:, None], columns - first[rows]), taps)
        weights[rows[:, 0]] = band
    return AxisTable(size, size, first.astype(np.int32), count.astype(np.int32), weights)


def gaussian_radius(sigma: float) -> int:
    return int(4 * sigma + 0.5)


def gaussian_taps(size: int, sigma: float, border: str) -> tuple[int, np.ndarray]:
    """Normalized weights of the positions ``i + offset, i + offset + 1, ...``, in float64: ``(offset, weights)``.

    Mirrored positions repeat, so that a filter longer than their period is folded into one period.
    """
    radius, period = gaussian_radius(sigma), mirror_period(size, border)
    if 2 * radius + 1 <= period:
        taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
        return -radius, taps / taps.sum()
    folded = np.zeros(period)
    step = period * max(1, BLOCK // period)
    for begin in range(-radius, radius + 1, step):
        at = np.arange(begin, begin + step)
        taps = np.where(at <= radius, np.exp(-0.5 * (at / sigma) ** 2), 0.0)
        folded += taps.reshape(-1, period).sum(0)
    return -radius, folded / folded.sum()


def mirror_period(size: int, border: str) -> int:
    return 2 * size if border == "symmetric" else max(2 * size - 2, 1)


def mirrored(index: np.ndarray, size: int, border: str) -> np.ndarray:
    """Positions inside an axis: mirrored at the edge of the border pixel (``"symmetric"``: d c b a | a b c d, scipy's
    ``reflect``) or at its centre (``"reflect"``: d c b | a b c d, torch's), as often as needed."""
    period = mirror_period(size, border)
    index = index % period
    return np.where(index < size, index, period - (1 if border == "symmetric" else 0) - index)
