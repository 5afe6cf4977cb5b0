"""Gaussian smoothing, one axis after the other: two launches with a float32 map between them.

One launch for both axes reads (8 sigma + 1)^2 pixels for each, 1089 for sigma 4; two read 66, nearly all of them from
the first-level cache. Every pixel has the same taps, at mirrored positions, so that no pixel needs weights of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from murf_fast._layout import is_channels_last
from murf_fast.kernels import launch
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.resample import SHORT_SUM
from murf_fast.tables._table import kept
from murf_fast.tables.gaussian import gaussian_taps, mirror_period

__all__ = ["gaussian_blur"]


class Lines(NamedTuple):
    """A map as lines along one axis: strides of the image, of the two other dimensions and of the axis itself."""

    data: Tensor
    stride_b: int
    stride_outer: int
    stride_inner: int
    stride_axis: int


class Filter(NamedTuple):
    """Position ``i`` of an axis of ``size`` reads ``i + offset``, ``i + offset + 1``, ... with the ``weights``.

    Positions repeat with the ``period``; those from ``size`` on are mirrored to ``mirror`` minus themselves.
    """

    weights: Tensor
    taps: int
    offset: int
    size: int
    period: int
    mirror: int


@dataclass(frozen=True)
class BlurTile:
    """Positions along the axis, and lines, that a program works on."""

    positions: int
    lines: int
    warps: int


def blur_tile(along_contiguous: bool, positions: int, lines: int) -> BlurTile:
    """Runs of 128 values in memory, and 1024 values: eight a thread share the mirrored positions of a tap."""
    run = min(launch.power_of_two(positions if along_contiguous else lines), 128)
    other = min(launch.power_of_two(lines if along_contiguous else positions), 1024 // run)
    return BlurTile(run, other, 4) if along_contiguous else BlurTile(other, run, 4)


@kernel(do_not_specialize=["outer", "inner"])
def _blur_axis(x, out, filter, outer, inner, ALONG_CONTIGUOUS: tl.constexpr, LONG: tl.constexpr,
               POSITIONS: tl.constexpr, LINES: tl.constexpr):  # fmt: skip
    """A tile of neighbouring lines; what is contiguous in memory is the tile's last dimension."""
    p_tiles, l_tiles = tl.cdiv(filter.size, POSITIONS), tl.cdiv(inner, LINES)
    program = tl.program_id(0)
    if ALONG_CONTIGUOUS:
        p_tile, rest = program % p_tiles, program // p_tiles
        l_tile, rest = rest % l_tiles, rest // l_tiles
    else:
        l_tile, rest = program % l_tiles, program // l_tiles
        p_tile, rest = rest % p_tiles, rest // p_tiles
    b, o = (rest // outer).to(tl.int64), (rest % outer).to(tl.int64)
    position = p_tile * POSITIONS + tl.arange(0, POSITIONS)
    line = l_tile * LINES + tl.arange(0, LINES)
    if ALONG_CONTIGUOUS:
        position, line = position[None, :], line[:, None]
    else:
        position, line = position[:, None], line[None, :]
    line_inside = line < inner
    lines = x.data + b * x.stride_b + o * x.stride_outer + line.to(tl.int64) * x.stride_inner
    # Into 0 .. period - 1 once; from there on a tap is one step.
    at = (position + filter.offset) % filter.period
    at = tl.where(at < 0, at + filter.period, at)
    total = tl.zeros((LINES, POSITIONS) if ALONG_CONTIGUOUS else (POSITIONS, LINES), dtype=tl.float32)
    if LONG:
        joined = total.to(tl.float64)
    t = 0
    while t < filter.taps:
        source = tl.where(at < filter.size, at, filter.mirror - at)
        value = tl.load(lines + source.to(tl.int64) * x.stride_axis, mask=line_inside, other=0.0)
        total += tl.load(filter.weights + t) * value.to(tl.float32)
        at = tl.where(at == filter.period - 1, 0, at + 1)
        t += 1
        if LONG:  # noqa: SIM102  the second is known to the GPU only
            # Sums of a few taps keep their digits; they are joined in float64.
            if (t % SHORT_SUM == 0) | (t == filter.taps):
                joined += total.to(tl.float64)
                total = tl.zeros_like(total)
    if LONG:
        total = joined.to(tl.float32)
    target = out.data + b * out.stride_b + o * out.stride_outer + line.to(tl.int64) * out.stride_inner
    target += position.to(tl.int64) * out.stride_axis
    tl.store(target, total.to(out.data.dtype.element_ty), mask=line_inside & (position < filter.size))


def gaussian_blur(x: Tensor, sigma: float, border: str, out: Tensor) -> None:
    """``out`` (B, C, H, W) of the map ``x``; a float32 map in the layout of ``out`` is held in between."""
    rows = torch.empty_like(out, dtype=torch.float32)
    with launch.on_device_of(out):
        _blur(x, rows, 2, sigma, border)
        _blur(rows, out, 3, sigma, border)


def _blur(x: Tensor, out: Tensor, axis: int, sigma: float, border: str) -> None:
    """Along dimension ``axis``. Lines side by side in memory are the inner ones."""
    inner, outer = (1, 5 - axis) if is_channels_last(out) else (5 - axis, 1)
    along_contiguous = axis == 3 and inner != 1
    tile = blur_tile(along_contiguous, out.shape[axis], out.shape[inner])
    line_tiles = launch.cdiv(out.shape[inner], tile.lines)
    programs = out.shape[0] * out.shape[outer] * line_tiles * launch.cdiv(out.shape[axis], tile.positions)
    filter = _filter(out.shape[axis], sigma, border, out.device)
    _blur_axis[(programs,)](
        _lines(x, axis, outer, inner),
        _lines(out, axis, outer, inner),
        filter,
        out.shape[outer],
        out.shape[inner],
        ALONG_CONTIGUOUS=along_contiguous,
        LONG=filter.taps > SHORT_SUM.value,
        POSITIONS=tile.positions,
        LINES=tile.lines,
        num_warps=tile.warps,
    )


def _lines(x: Tensor, axis: int, outer: int, inner: int) -> Lines:
    return Lines(x, x.stride(0), x.stride(outer), x.stride(inner), x.stride(axis))


def _filter(size: int, sigma: float, border: str, device: torch.device) -> Filter:
    offset, weights = _weights(size, sigma, border, device)
    (weights,) = kept(device, ("gaussian", size, sigma, border), (weights,))
    period = mirror_period(size, border)
    return Filter(weights, len(weights), offset, size, period, period - (border == "symmetric"))


@lru_cache(maxsize=256)
def _weights(size: int, sigma: float, border: str, device: torch.device) -> tuple[int, Tensor]:
    """The first position's offset and the taps, float32."""
    offset, taps = gaussian_taps(size, sigma, border)
    return offset, torch.from_numpy(taps.astype(np.float32)).to(device)
