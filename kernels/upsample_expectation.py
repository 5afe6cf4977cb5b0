"""Expected value per pixel of a distribution over channels, and its gradients, without full-resolution logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch, resample
from murf_fast.kernels.aligned_maps import aligned_maps
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.resample import SHORT_SUM, Axes, resampled_sum

__all__ = ["upsample_expectation", "upsample_expectation_backward"]

LINEAR_FLOOR = tl.constexpr(0.1)


@triton.jit
def _mass(logits, scale, SOFTMAX: tl.constexpr):
    """The normalized distribution: ``scale`` is the log of the softmax's denominator, or the sum of the linear norm."""
    if SOFTMAX:
        return tl.exp(logits - scale)
    else:
        return (tl.where(logits < 0.0, 0.0, logits) + LINEAR_FLOOR) / scale


@kernel
def _upsample_expectation(maps, readable, bias, bias_stride, values, out, scales, channels, height, width,
                          SOFTMAX: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
                          TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    x_tiles = tl.cdiv(width, BLOCK_X)
    row = program // x_tiles
    b, y = row // height, row % height
    x = (program % x_tiles) * BLOCK_X + tl.arange(0, BLOCK_X)
    x_inside = x < width
    largest = tl.full((BLOCK_X,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_X,), dtype=tl.float32)
    moment = tl.zeros((BLOCK_X,), dtype=tl.float32)
    shift = tl.zeros((BLOCK_X,), dtype=tl.float32)
    start = 0
    while start < channels:
        c = start + tl.arange(0, BLOCK_C)
        c_inside = c < channels
        logits = resampled_sum(
            maps, readable, bias, bias_stride, b, y, x, c, x_inside, c_inside, BLOCK_X, BLOCK_C, TAPS_Y, TAPS_X
        )
        value = tl.load(values + c, mask=c_inside, other=0.0)
        if SOFTMAX:
            logits = tl.where(c_inside[None, :], logits, float("-inf"))
            peak = tl.maximum(largest, tl.max(logits, axis=1))
            # A chunk of -inf alone must not turn into NaN before a later chunk has a finite logit.
            shift = tl.where(peak == float("-inf"), 0.0, peak)
            shrink = tl.exp(largest - shift)
            mass = tl.exp(logits - shift[:, None])
            total, moment, largest = total * shrink, moment * shrink, peak
        else:
            mass = tl.where(logits < 0.0, 0.0, logits) + LINEAR_FLOOR
            mass = tl.where(c_inside[None, :], mass, 0.0)
        total += tl.sum(mass, axis=1)
        moment += tl.sum(mass * value[None, :], axis=1)
        start += BLOCK_C
    at = row.to(tl.int64) * width + x
    tl.store(out + at, moment / total, mask=x_inside)
    if scales is not None:
        if SOFTMAX:
            tl.store(scales + at, shift + tl.log(total), mask=x_inside)
        else:
            tl.store(scales + at, total, mask=x_inside)


@kernel
def _upsample_expectation_backward(maps, readable, bias, bias_stride, values, expectations, scales, grad_out, gradient,
                                   y_table, x_table,
                                   channels, height, width, map_height, map_width,
                                   SOFTMAX: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
                                   TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    c_tiles = tl.cdiv(channels, BLOCK_C)
    x_tiles = tl.cdiv(map_width, BLOCK_X)
    row = program // c_tiles // x_tiles
    b, cell_y = row // map_height, row % map_height
    cell_x = (program // c_tiles % x_tiles) * BLOCK_X + tl.arange(0, BLOCK_X)
    c = (program % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    cell_inside, c_inside = cell_x < map_width, c < channels
    value = tl.load(values + c, mask=c_inside, other=0.0)
    first = tl.load(x_table.first + cell_x, mask=cell_inside, other=0)
    count = tl.load(x_table.count + cell_x, mask=cell_inside, other=0)
    first_y = tl.load(y_table.first + cell_y)
    # A cell may gather a million pixels: float32 sums of a few of them, joined in float64.
    total = tl.zeros((BLOCK_X, BLOCK_C), dtype=tl.float64)
    part = tl.zeros((BLOCK_X, BLOCK_C), dtype=tl.float32)
    count_y = tl.load(y_table.count + cell_y)
    t = 0
    while t < y_table.taps:
        y = tl.minimum(first_y + t, height - 1)
        weight_y = tl.load(y_table.weights + cell_y * y_table.taps + t, mask=t < count_y, other=0.0)
        pixels = (b * height + y).to(tl.int64) * width
        s = 0
        while s < x_table.taps:
            used = cell_inside & (tl.zeros_like(count) + t < count_y) & (s < count)
            x = first + s
            weight = weight_y * tl.load(x_table.weights + cell_x * x_table.taps + s, mask=used, other=0.0)
            logits = resampled_sum(
                maps, readable, bias, bias_stride, b, y, x, c, used, c_inside, BLOCK_X, BLOCK_C, TAPS_Y, TAPS_X
            )
            upstream = weight * tl.load(grad_out + pixels + x, mask=used, other=0.0)
            expectation = tl.load(expectations + pixels + x, mask=used, other=0.0)
            scale = tl.load(scales + pixels + x, mask=used, other=1.0)
            slope = upstream[:, None] * (value[None, :] - expectation[:, None])
            if SOFTMAX:
                slope *= _mass(logits, scale[:, None], True)
            else:
                slope = tl.where(logits > 0.0, slope / scale[:, None], 0.0)
            part += tl.where(used[:, None], slope, 0.0)
            s += 1
            if (s % SHORT_SUM == 0) | (s == x_table.taps):
                total += part.to(tl.float64)
                part = tl.zeros((BLOCK_X, BLOCK_C), dtype=tl.float32)
        t += 1
    cells = (row.to(tl.int64) * map_width + cell_x) * channels
    tl.store(
        gradient + cells[:, None] + c[None, :], total.to(tl.float32), mask=cell_inside[:, None] & c_inside[None, :]
    )


@kernel
def _row_value_gradients(maps, readable, bias, bias_stride, scales, grad_out, sums, channels, height, width,
                         SOFTMAX: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
                         TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    c_tiles = tl.cdiv(channels, BLOCK_C)
    row = program // c_tiles
    b, y = row // height, row % height
    c = (program % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = c < channels
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    start = 0
    while start < width:
        x = start + tl.arange(0, BLOCK_X)
        x_inside = x < width
        logits = resampled_sum(
            maps, readable, bias, bias_stride, b, y, x, c, x_inside, c_inside, BLOCK_X, BLOCK_C, TAPS_Y, TAPS_X
        )
        at = row.to(tl.int64) * width + x
        scale = tl.load(scales + at, mask=x_inside, other=1.0)
        upstream = tl.load(grad_out + at, mask=x_inside, other=0.0)
        part = upstream[:, None] * _mass(logits, scale[:, None], SOFTMAX)
        total += tl.sum(tl.where(x_inside[:, None], part, 0.0), axis=0)
        start += BLOCK_X
    tl.store(sums + row.to(tl.int64) * channels + c, total, mask=c_inside)


def upsample_expectation(
    features: list[Tensor], axes: Axes, bias: Tensor | None, values: Tensor, softmax: bool, out: Tensor
) -> None:
    """``out = sum_k p_k values_k``, (B, H, W) float32; p the softmax or the normalized relu + 0.1 of the logits."""
    _expectation(features, axes, bias, values, softmax, out, None)


def upsample_expectation_backward(
    features: list[Tensor],
    axes: Axes,
    bias: Tensor | None,
    values: Tensor,
    softmax: bool,
    grad_out: Tensor,
    gradients: list[Tensor],
    row_value_gradients: Tensor | None,
) -> None:
    """Gradients of the maps (float32, channels_last, overwritten) and of the values (one sum per output row).

    The expectation and the normalizer of every pixel are computed again, into two float32 maps (B, H, W); each cell
    then gathers its pixels through the transposed tables and computes only its own channels' logits.
    """
    batch, height, width = grad_out.shape
    channels = features[0].shape[1]
    expectations, scales = torch.empty_like(grad_out), torch.empty_like(grad_out)
    _expectation(features, axes, bias, values, softmax, expectations, scales)
    maps, readable = aligned_maps(features, height * width)
    taps, resized = resample.taps_of(axes), resample.resized_maps(maps, axes)
    with launch.on_device_of(grad_out):
        for gradient, (y, x) in zip(gradients, axes, strict=True):
            tile = resample.gather_tile(channels, x.in_size)
            programs = batch * y.in_size * launch.cdiv(x.in_size, tile.pixels) * launch.cdiv(channels, tile.channels)
            _upsample_expectation_backward[(programs,)](
                resized,
                readable,
                bias,
                resample.bias_stride(bias),
                values,
                expectations,
                scales,
                grad_out,
                gradient,
                resample.table_of(y.transposed, grad_out.device),
                resample.table_of(x.transposed, grad_out.device),
                channels,
                height,
                width,
                y.in_size,
                x.in_size,
                SOFTMAX=softmax,
                BLOCK_X=tile.pixels,
                BLOCK_C=tile.channels,
                TAPS_Y=taps.y,
                TAPS_X=taps.x,
                num_warps=tile.warps,
                maxnreg=tile.registers,
            )
        if row_value_gradients is not None:
            tile = resample.reduce_tile(len(features), channels, width)
            _row_value_gradients[(batch * height * launch.cdiv(channels, tile.channels),)](
                resized,
                readable,
                bias,
                resample.bias_stride(bias),
                scales,
                grad_out,
                row_value_gradients,
                channels,
                height,
                width,
                SOFTMAX=softmax,
                BLOCK_X=tile.pixels,
                BLOCK_C=tile.channels,
                TAPS_Y=taps.y,
                TAPS_X=taps.x,
                num_warps=tile.warps,
                maxnreg=tile.registers,
            )


def _expectation(
    features: list[Tensor],
    axes: Axes,
    bias: Tensor | None,
    values: Tensor,
    softmax: bool,
    out: Tensor,
    scales: Tensor | None,
) -> None:
    batch, height, width = out.shape
    channels = features[0].shape[1]
    maps, readable = aligned_maps(features, height * width)
    tile, taps = resample.reduce_tile(len(features), channels, width), resample.taps_of(axes)
    with launch.on_device_of(out):
        _upsample_expectation[(batch * height * launch.cdiv(width, tile.pixels),)](
            resample.resized_maps(maps, axes),
            readable,
            bias,
            resample.bias_stride(bias),
            values,
            out,
            scales,
            channels,
            height,
            width,
            SOFTMAX=softmax,
            BLOCK_X=tile.pixels,
            BLOCK_C=tile.channels,
            TAPS_Y=taps.y,
            TAPS_X=taps.x,
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )
