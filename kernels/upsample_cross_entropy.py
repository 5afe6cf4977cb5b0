"""Cross-entropy of low-resolution logits against full-resolution labels, forward and gradients.

Per pixel, with label t, class weights w, smoothing e over K classes, ``hard = 1 - e`` and ``soft = e / K``:
``loss = hard w_t (lse - z_t) + soft sum_k w_k (lse - z_k)`` and
``d loss / d z_k = hard w_t (p_k - [k = t]) + soft (p_k sum_j w_j - w_k)``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch, resample
from murf_fast.kernels.aligned_maps import aligned_maps
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.resample import SHORT_SUM, Axes, resampled_sum

__all__ = ["upsample_cross_entropy", "upsample_cross_entropy_backward"]


@triton.jit
def _label_weight(weight, label, channels):
    """w_t; NaN for a label that is no class, which then shows in the loss and is never an address."""
    valid = (label >= 0) & (label < channels)
    if weight is not None:
        return tl.load(weight + label, mask=valid, other=float("nan"))
    else:
        return tl.where(valid, 1.0, float("nan"))


@kernel
def _upsample_cross_entropy(maps, readable, bias, bias_stride, target, weight, weight_sum, ignore_index, hard, soft,
                            loss, lse, pixels, channels, height, width, SMOOTHED: tl.constexpr,
                            BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
                            TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    x_tiles = tl.cdiv(width, BLOCK_X)
    row = program // x_tiles
    b, y = row // height, row % height
    x = (program % x_tiles) * BLOCK_X + tl.arange(0, BLOCK_X)
    x_inside = x < width
    at = row.to(tl.int64) * width + x
    label = tl.load(target + at, mask=x_inside, other=ignore_index)
    counts = x_inside & (label != ignore_index)
    largest = tl.full((BLOCK_X,), float("-inf"), dtype=tl.float32)
    shift = tl.zeros((BLOCK_X,), dtype=tl.float32)
    total = tl.zeros((BLOCK_X,), dtype=tl.float32)
    chosen = tl.zeros((BLOCK_X,), dtype=tl.float32)
    smoothing = tl.zeros((BLOCK_X,), dtype=tl.float32)
    seen = tl.sum(tl.zeros((BLOCK_C,), dtype=tl.float32), axis=0)  # weights of the classes so far
    start = 0
    while start < channels:
        c = start + tl.arange(0, BLOCK_C)
        c_inside = c < channels
        logits = resampled_sum(
            maps, readable, bias, bias_stride, b, y, x, c, counts, c_inside, BLOCK_X, BLOCK_C, TAPS_Y, TAPS_X
        )
        chosen += tl.sum(tl.where(c[None, :] == label[:, None], logits, 0.0), axis=1)
        logits = tl.where(c_inside[None, :], logits, float("-inf"))
        peak = tl.maximum(largest, tl.max(logits, axis=1))
        before = shift
        # A chunk of -inf alone must not turn into NaN before a later chunk has a finite logit.
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        if SMOOTHED:
            # Relative to the shift: sums of large logits have the digits of large logits only.
            share = c_inside.to(tl.float32)
            if weight is not None:
                share = tl.load(weight + c, mask=c_inside, other=0.0)
            smoothing += (before - shift) * seen
            smoothing += tl.sum(tl.where(c_inside[None, :], (logits - shift[:, None]) * share[None, :], 0.0), axis=1)
            seen += tl.sum(share, axis=0)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        largest = peak
        start += BLOCK_C
    log_total = tl.log(total)
    result = hard * _label_weight(weight, label, channels) * (log_total - (chosen - shift))
    if SMOOTHED:
        all_weights = tl.load(weight_sum) if weight is not None else channels
        result += soft * (all_weights * log_total - smoothing)
    tl.store(loss + at, tl.where(counts, result, 0.0), mask=x_inside)
    tl.store(lse + at, tl.where(counts, shift, 0.0), mask=x_inside)
    tl.store(lse + pixels + at, tl.where(counts, log_total, 0.0), mask=x_inside)


@kernel
def _upsample_cross_entropy_backward(maps, readable, bias, bias_stride, target, weight, weight_sum, ignore_index,
                                     hard, soft, lse, all_pixels, grad_loss, gradient,
                                     y_table, x_table,
                                     channels, height, width, map_height, map_width, SMOOTHED: tl.constexpr,
                                     BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
                                     TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    c_tiles = tl.cdiv(channels, BLOCK_C)
    x_tiles = tl.cdiv(map_width, BLOCK_X)
    row = program // c_tiles // x_tiles
    b, cell_y = row // map_height, row % map_height
    cell_x = (program // c_tiles % x_tiles) * BLOCK_X + tl.arange(0, BLOCK_X)
    c = (program % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    cell_inside, c_inside = cell_x < map_width, c < channels
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
            label = tl.load(target + pixels + x, mask=used, other=ignore_index)
            counts = used & (label != ignore_index)
            tap = weight_y * tl.load(x_table.weights + cell_x * x_table.taps + s, mask=used, other=0.0)
            upstream = tap * tl.load(grad_loss + pixels + x, mask=counts, other=0.0)
            shift = tl.load(lse + pixels + x, mask=counts, other=0.0)
            log_total = tl.load(lse + all_pixels + pixels + x, mask=counts, other=0.0)
            logits = resampled_sum(
                maps, readable, bias, bias_stride, b, y, x, c, counts, c_inside, BLOCK_X, BLOCK_C, TAPS_Y, TAPS_X
            )
            on_label = upstream * hard * _label_weight(weight, label, channels)
            scale = on_label
            if SMOOTHED:
                if weight is not None:
                    scale += upstream * soft * tl.load(weight_sum)
                else:
                    scale += upstream * soft * channels
            slope = scale[:, None] * tl.exp((logits - shift[:, None]) - log_total[:, None])
            slope -= tl.where(c[None, :] == label[:, None], on_label[:, None], 0.0)
            if SMOOTHED:
                if weight is not None:
                    slope -= (upstream * soft)[:, None] * tl.load(weight + c, mask=c_inside, other=0.0)[None, :]
                else:
                    slope -= (upstream * soft)[:, None]
            part += tl.where(counts[:, None], slope, 0.0)
            s += 1
            if (s % SHORT_SUM == 0) | (s == x_table.taps):
                total += part.to(tl.float64)
                part = tl.zeros((BLOCK_X, BLOCK_C), dtype=tl.float32)
        t += 1
    cells = (row.to(tl.int64) * map_width + cell_x) * channels
    tl.store(
        gradient + cells[:, None] + c[None, :], total.to(tl.float32), mask=cell_inside[:, None] & c_inside[None, :]
    )


def upsample_cross_entropy(
    features: list[Tensor],
    axes: Axes,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    loss: Tensor,
    lse: Tensor,
) -> None:
    """Loss of every pixel, (B, H, W) float32; 0 where ignored, NaN for labels out of range. ``lse``: (2, B, H, W), the
    largest logit and the logarithm of the sum of ``exp(z - largest)``, apart because together they lose the latter.
    """
    batch, height, width = target.shape
    channels = features[0].shape[1]
    maps, readable = aligned_maps(features, height * width)
    tile, taps = resample.reduce_tile(len(features), channels, width), resample.taps_of(axes)
    with launch.on_device_of(loss):
        _upsample_cross_entropy[(batch * height * launch.cdiv(width, tile.pixels),)](
            resample.resized_maps(maps, axes),
            readable,
            bias,
            resample.bias_stride(bias),
            target,
            weight,
            _weight_sum(weight, label_smoothing),
            ignore_index,
            1.0 - label_smoothing,
            label_smoothing / channels,
            loss,
            lse,
            target.numel(),
            channels,
            height,
            width,
            SMOOTHED=label_smoothing > 0,
            BLOCK_X=tile.pixels,
            BLOCK_C=tile.channels,
            TAPS_Y=taps.y,
            TAPS_X=taps.x,
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )


def upsample_cross_entropy_backward(
    features: list[Tensor],
    axes: Axes,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    lse: Tensor,
    grad_loss: Tensor,
    gradients: list[Tensor],
) -> None:
    """Gradients of the maps, float32 channels_last, overwritten.

    Each cell gathers its pixels through the transposed tables; with the saved log-sum-exp a pixel's softmax needs the
    logits of the cell's own chunk of classes only.
    """
    batch, height, width = target.shape
    channels = features[0].shape[1]
    maps, readable = aligned_maps(features, height * width)
    taps, resized = resample.taps_of(axes), resample.resized_maps(maps, axes)
    with launch.on_device_of(lse):
        weight_sum = _weight_sum(weight, label_smoothing)
        for gradient, (y, x) in zip(gradients, axes, strict=True):
            tile = resample.gather_tile(channels, x.in_size)
            programs = batch * y.in_size * launch.cdiv(x.in_size, tile.pixels) * launch.cdiv(channels, tile.channels)
            _upsample_cross_entropy_backward[(programs,)](
                resized,
                readable,
                bias,
                resample.bias_stride(bias),
                target,
                weight,
                weight_sum,
                ignore_index,
                1.0 - label_smoothing,
                label_smoothing / channels,
                lse,
                target.numel(),
                grad_loss,
                gradient,
                resample.table_of(y.transposed, lse.device),
                resample.table_of(x.transposed, lse.device),
                channels,
                height,
                width,
                y.in_size,
                x.in_size,
                SMOOTHED=label_smoothing > 0,
                BLOCK_X=tile.pixels,
                BLOCK_C=tile.channels,
                TAPS_Y=taps.y,
                TAPS_X=taps.x,
                num_warps=tile.warps,
                maxnreg=tile.registers,
            )


def _weight_sum(weight: Tensor | None, label_smoothing: float) -> Tensor | None:
    return weight.sum() if weight is not None and label_smoothing > 0 else None
