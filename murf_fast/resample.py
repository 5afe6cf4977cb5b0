"""Every interpolation of the field as one separable banded matrix per axis.

``Y = U_h X U_w^T``: bilinear, bicubic, both antialiased filters, area (adaptive average pooling) and nearest differ
only in the entries of ``U``; two chained resizes are the product of two such matrices, and a gradient is the
transposed one. :func:`axis` builds ``U`` once in float64 and keeps it as a table (first index, tap count, weights);
every kernel of the library walks these tables.

The rules are those of ``torch.nn.functional.interpolate`` with ``align_corners=False``. ``size=`` and
``scale_factor=`` differ: with a factor ``f`` the output has ``floor(n * f)`` pixels and the sampling step is ``1 / f``,
not ``n / floor(n * f)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

MODES = ("bilinear", "bicubic", "area", "nearest", "nearest-exact")
ANTIALIASED = ("bilinear", "bicubic")


@dataclass(frozen=True, eq=False)
class AxisTable:
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
        return _from_dense(self.dense().T)

    @cached_property
    def native(self):
        """The table as the C++ extension holds it."""
        from murf_fast import native

        return native.module().Axis(self.in_size, self.first, self.count, self.weights)

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(first, count, weights)`` as tensors on ``device``, copied there once."""
        copies = self._device_copies
        if device not in copies:
            copies[device] = tuple(torch.from_numpy(a).to(device) for a in (self.first, self.count, self.weights))
        return copies[device]

    @cached_property
    def _device_copies(self) -> dict:
        return {}


@lru_cache(maxsize=4096)
def axis(
    in_size: int,
    out_size: int,
    mode: str = "bilinear",
    antialias: bool = False,
    via: int | None = None,
    scale_factor: float | None = None,
) -> AxisTable:
    """Table of one axis, ``in_size -> out_size`` pixels, or ``in_size -> via -> out_size`` in two chained resizes.

    With ``scale_factor`` the sampling step is ``1 / scale_factor`` instead of ``in_size / out_size``.
    """
    if via is None:
        return _from_dense(_matrix(in_size, out_size, mode, antialias, scale_factor))
    if scale_factor is not None:
        raise ValueError("murf_fast: `via` and `scale_factor` exclude each other")
    first = _matrix(in_size, via, mode, antialias, None)
    second = _matrix(via, out_size, mode, antialias, None)
    return _from_dense(second @ first)


@lru_cache(maxsize=1024)
def gram_axis(
    in_size: int, out_size: int, mode: str = "bilinear", antialias: bool = False, via: int | None = None
) -> AxisTable:
    """Table of the symmetric ``U^T U`` of :func:`axis`: second moments of a resized map without resizing it."""
    dense = axis(in_size, out_size, mode, antialias, via).dense()
    return _from_dense(dense.T @ dense)


@lru_cache(maxsize=256)
def gaussian_axis(size: int, sigma: float, border: str) -> AxisTable:
    """Table of a Gaussian filter, cut off at four sigma. Taps beyond the border fold back into the row's own band."""
    radius = gaussian_radius(sigma)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    columns = mirrored(np.arange(size)[:, None] + np.arange(-radius, radius + 1), size, border)
    first = np.maximum(np.arange(size) - radius, 0)
    count = np.minimum(np.arange(size) + radius + 1, size) - first
    weights = np.zeros((size, int(count.max())))
    np.add.at(weights, (np.arange(size)[:, None], columns - first[:, None]), taps / taps.sum())
    return AxisTable(size, size, first.astype(np.int32), count.astype(np.int32), weights.astype(np.float32))


def gaussian_radius(sigma: float) -> int:
    return int(4 * sigma + 0.5)


def mirrored(index: np.ndarray, size: int, border: str) -> np.ndarray:
    """Positions inside an axis: mirrored at the edge of the border pixel (``"symmetric"``: d c b a | a b c d, scipy's
    ``reflect``) or at its centre (``"reflect"``: d c b | a b c d, torch's), as often as needed."""
    if border == "symmetric":
        index = index % (2 * size)
        return np.where(index < size, index, 2 * size - 1 - index)
    period = max(2 * size - 2, 1)
    index = index % period
    return np.where(index < size, index, period - index)


@lru_cache(maxsize=256)
def pseudo_inverse(in_size: int, out_size: int, mode: str, antialias: bool) -> np.ndarray:
    """(in_size, out_size) pseudo-inverse of one axis, in float64: what undoes a resize."""
    return np.linalg.pinv(_matrix(in_size, out_size, mode, antialias, None))


def scaled_size(in_size: int, scale_factor: float) -> int:
    """Pixels that ``F.interpolate(scale_factor=...)`` gives an axis."""
    return math.floor(in_size * scale_factor)


def _matrix(in_size: int, out_size: int, mode: str, antialias: bool, scale_factor: float | None) -> np.ndarray:
    if antialias and mode not in ANTIALIASED:
        raise ValueError(f"murf_fast: `antialias` needs mode in {ANTIALIASED}, got {mode!r}")
    step = in_size / out_size if scale_factor is None else 1.0 / scale_factor
    rows = np.arange(out_size)
    matrix = np.zeros((out_size, in_size))
    if mode in ("nearest", "nearest-exact"):
        # torch computes these positions in float32 for every dtype, and one rounding moves a whole pixel.
        offset = np.float32(0.5 if mode == "nearest-exact" else 0.0)
        position = ((rows.astype(np.float32) + offset) * np.float32(step)).astype(np.int64)
        if mode == "nearest" and out_size in (in_size, 2 * in_size):
            position = rows * in_size // out_size  # torch ignores a scale factor here
        matrix[rows, np.minimum(position, in_size - 1)] = 1.0
    elif mode == "area":
        for i in rows:
            lo, hi = i * in_size // out_size, -((-(i + 1) * in_size) // out_size)
            matrix[i, lo:hi] = 1.0 / (hi - lo)
    elif antialias:
        _fill_antialiased(matrix, step, mode)
    elif mode == "bilinear":
        position = np.maximum(step * (rows + 0.5) - 0.5, 0.0)
        left = np.minimum(np.floor(position).astype(np.int64), in_size - 1)
        t = position - left
        np.add.at(matrix, (rows, left), 1.0 - t)
        np.add.at(matrix, (rows, np.minimum(left + 1, in_size - 1)), t)
    elif mode == "bicubic":
        position = step * (rows + 0.5) - 0.5
        left = np.floor(position).astype(np.int64)
        for tap in range(-1, 3):
            weight = _keys(position - (left + tap), a=-0.75)
            np.add.at(matrix, (rows, np.clip(left + tap, 0, in_size - 1)), weight)
    else:
        raise ValueError(f"murf_fast: `mode` must be one of {MODES}, got {mode!r}")
    return matrix


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
    """Keys' cubic convolution kernel. ``a`` is -0.75 without antialiasing and -0.5 with it (as in Pillow)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _from_dense(matrix: np.ndarray) -> AxisTable:
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
