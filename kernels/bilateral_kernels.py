"""Joint bilateral kernels of every pixel of a guidance, and their gradients.

The guidance is projected once, to as many numbers per pixel as there are keys. From there one kernel takes every
pixel's window of the projection to its normalized taps, one goes back to the gradients of the logits, and the unfolded
window exists in neither. The gradient of a logit, <p[window], p[pixel]>, is an adaptive convolution of the projection:
by the logits' gradients for the pixel in the middle, and its adjoint for the pixels around.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import folded, launch
from murf_fast.kernels.adaptive_conv import adaptive_conv, adaptive_conv_backward_source
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.bilateral_network import (
    FIXUP0,
    FIXUP1,
    RANGE0,
    RANGE1,
    SHARE,
    Network,
    masked,
    pixels,
    without_autocast,
)
from murf_fast.kernels.folded import line_of, taps_of_pixels
from murf_fast.kernels.launch import Map, map_of
from murf_fast.tables.folded import folded_axis

__all__ = ["bilateral_kernels", "bilateral_kernels_backward"]


@dataclass(frozen=True)
class SimilarityTile:
    """One program of the range softmax: pixels of a row, taps along an axis, and keys at a time."""

    pixels: int
    taps: int
    keys: int
    warps: int


def similarity_tile(diameter: int, keys: int) -> SimilarityTile:
    """At most 8192 products of keys for one row of taps at a time, 64 a thread in flight."""
    taps, block = launch.power_of_two(diameter), min(launch.power_of_two(keys), 32)
    return SimilarityTile(max(1, min(32, 8192 // (taps * max(block, taps)))), taps, block, 4)


@triton.jit
def _reflect(i, n):
    i = tl.abs(i)
    return (n - 1) - tl.abs((n - 1) - i)


@triton.jit
def _sum_taps(values):
    return tl.sum(tl.sum(values, axis=2), axis=1)[:, None, None]


@triton.jit
def _distances(RADIUS: tl.constexpr, BLOCK_T: tl.constexpr):
    """(1, i, j): squared distances of taps from the middle in float64, with the edge of the window at 1."""
    EDGE: tl.constexpr = RADIUS if RADIUS > 0 else 1
    i = (tl.arange(0, BLOCK_T) - EDGE).to(tl.float64) / EDGE
    return (i * i)[None, :, None] + (i * i)[None, None, :]


@triton.jit
def _similarity(projected, top, held, scalars, b, y, x, height, width, keys, RADIUS: tl.constexpr,
                BLOCK_X: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Of every pixel and tap, (x, i, j): logit relative to the largest, softmax, spatial weight; the temperature.

    ``projected`` (images, held, width, keys) begins with row ``top`` of the band's images.
    """
    TAPS: tl.constexpr = 2 * RADIUS + 1
    i = tl.arange(0, BLOCK_T)[None, :, None]
    j = tl.arange(0, BLOCK_T)[None, None, :]
    column = tl.arange(0, BLOCK_T)
    inside = (x < width)[:, None, None] & (column < TAPS)[None, :, None]
    neighbours = _reflect(x[:, None] + column[None, :] - RADIUS, width)
    image = projected + (b.to(tl.int64) * held - top) * width * keys
    logits = tl.zeros((BLOCK_X, BLOCK_T, BLOCK_T), dtype=tl.float32)
    start = 0
    while start < keys:
        k = start + tl.arange(0, BLOCK_K)
        centers = image + (y.to(tl.int64) * width + x) * keys
        center = tl.load(centers[:, None] + k[None, :], mask=(x < width)[:, None] & (k < keys)[None, :], other=0.0)
        used = inside & (k < keys)[None, None, :]
        row = 0
        while row < TAPS:
            window = image + (_reflect(y + row - RADIUS, height).to(tl.int64) * width + neighbours) * keys
            value = tl.load(window[:, :, None] + k[None, None, :], mask=used, other=0.0)
            product = tl.sum(value * center[:, None, :], axis=2)
            logits += tl.where(i == row, product[:, None, :], 0.0)
            row += 1
        start += BLOCK_K
    valid = (i < TAPS) & (j < TAPS)
    masked = tl.where(valid, logits, float("-inf"))
    # Kept relative to the largest: the temperature's gradient would cancel otherwise.
    relative = logits - tl.max(tl.max(masked, axis=2), axis=1)[:, None, None]
    # In float64: every pixel has the same error in these two, which the gradients of parameters add up.
    raw = tl.load(scalars.range_temp).to(tl.float32).to(tl.float64)
    scale = tl.minimum(tl.maximum(tl.exp(raw), 1e-4), 1e4).to(tl.float32)
    sigma = tl.load(scalars.sigma_spatial).to(tl.float32).to(tl.float64)
    gaussian = tl.where(valid, tl.exp(-_distances(RADIUS, BLOCK_T) / (2 * sigma * sigma)).to(tl.float32), 0.0)
    similarity = tl.where(valid, tl.exp(scale * relative), 0.0)
    similarity /= _sum_taps(similarity)
    return tl.where(valid, relative, 0.0), similarity, gaussian, scale


@kernel
def _bilateral_kernels(projected, top, held, scalars, out, height, width, keys, row, rows,
                       RADIUS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_T: tl.constexpr,
                       BLOCK_K: tl.constexpr):  # fmt: skip
    """Normalized kernels of a band's pixels, before the fix-up."""
    line, x = line_of(width, BLOCK_X)
    b, y = line // rows, line % rows
    _, similarity, gaussian, _ = _similarity(
        projected, top, held, scalars, b, row + y, x, height, width, keys,
        RADIUS, BLOCK_X, BLOCK_T, BLOCK_K
    )  # fmt: skip
    weighted = similarity * gaussian
    result = weighted / tl.maximum(_sum_taps(weighted), 1e-7)
    pointers, inside = taps_of_pixels(out, b, y, x, width, 2 * RADIUS + 1, BLOCK_T)
    tl.store(pointers, result.to(out.data.dtype.element_ty), mask=inside)


@kernel
def _bilateral_kernels_backward(projected, top, held, scalars, grad, grad_logits, grad_scalars,
                                height, width, keys, row, rows,
                                RADIUS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_T: tl.constexpr,
                                BLOCK_K: tl.constexpr):  # fmt: skip
    """From gradients of normalized kernels to those of the logits, and this program's part of the two scalars'."""
    line, x = line_of(width, BLOCK_X)
    b, y = line // rows, line % rows
    relative, similarity, gaussian, scale = _similarity(
        projected, top, held, scalars, b, row + y, x, height, width, keys,
        RADIUS, BLOCK_X, BLOCK_T, BLOCK_K
    )  # fmt: skip
    pointers, inside = taps_of_pixels(grad, b, y, x, width, 2 * RADIUS + 1, BLOCK_T)
    upstream = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    # kernels = similarity * spatial / total, unless the clamp holds
    weighted = similarity * gaussian
    total = _sum_taps(weighted)
    inverse = 1.0 / tl.maximum(total, 1e-7)
    mean = tl.where(total < 1e-7, 0.0, _sum_taps(upstream * weighted) * inverse)
    slope = tl.where(inside, (upstream - mean) * inverse, 0.0)
    of_spatial = tl.sum(_sum_taps(slope * weighted * _distances(RADIUS, BLOCK_T).to(tl.float32)))
    # similarity = softmax(temperature * logits)
    slope *= gaussian
    slope = (slope - _sum_taps(slope * similarity)) * similarity
    of_temperature = tl.sum(_sum_taps(slope * relative))
    pointers, inside = taps_of_pixels(grad_logits, b, y, x, width, 2 * RADIUS + 1, BLOCK_T)
    tl.store(pointers, slope * scale, mask=inside)
    tl.store(grad_scalars + 2 * tl.program_id(0), of_temperature)
    tl.store(grad_scalars + 2 * tl.program_id(0) + 1, of_spatial)


def bilateral_kernels(
    guidance: Tensor,
    params: list[Tensor],
    range_mask: Tensor | None,
    fixup_mask: Tensor | None,
    radius: int,
    out: Tensor,
) -> None:
    """``out`` (B, D * D, H, W) of any strides."""
    with launch.on_device_of(guidance):
        net = Network(guidance, params, range_mask, fixup_mask, radius)
        for band in net.bands():
            kernels_of_band(net, band, folded.rows_of(out, band))


def kernels_of_band(net: Network, band: folded.Band, out: Tensor) -> None:
    """``out`` (images, D * D, rows, width) of any strides; projects the rows that the band's windows touch."""
    top, end = max(0, band.row - net.radius), min(net.guidance.shape[2], band.row + band.rows + net.radius)
    projected = net.project(folded.Band(band.image, band.images, top, end - top))
    if not net.has_fixup:
        _launch(_bilateral_kernels, net, band, projected, top, map_of(out))
        return
    normalized = net.empty(band.images, band.rows, net.guidance.shape[3], net.taps)
    _launch(_bilateral_kernels, net, band, projected, top, map_of(normalized.permute(0, 3, 1, 2)))
    net.correct(normalized, band, out)


def bilateral_kernels_backward(
    grad: Tensor,
    guidance: Tensor,
    params: list[Tensor],
    range_mask: Tensor | None,
    fixup_mask: Tensor | None,
    radius: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of the guidance (B, G, H, W) and of the concatenated parameters, both float32."""
    with launch.on_device_of(guidance), without_autocast(guidance):
        net = Network(guidance, params, range_mask, fixup_mask, radius)
        # Over bands the sums go on in float64: few numbers, and terms that cancel.
        grads = [torch.zeros_like(p, dtype=torch.float64) for p in net.params]
        batch, guides, height, width = guidance.shape
        projected = net.params[0].new_empty(batch, height, width, net.keys)
        for band in net.bands():
            _band(projected, band).copy_(net.project(band))
        grad_guidance = projected.new_zeros(batch, height, width, guides)
        grad_logits = _to_logits(net, grad, projected, grads, grad_guidance)
        _to_guidance(net, projected, grad_logits, grads, grad_guidance)
        return grad_guidance.permute(0, 3, 1, 2), torch.cat([g.flatten() for g in grads]).float()


def _to_logits(net: Network, grad: Tensor, projected: Tensor, grads: list[Tensor], grad_guidance: Tensor) -> Tensor:
    """Gradients of the logits (B, H, W, D * D); adds those of the fix-up and of the scalars."""
    grad_logits = projected.new_empty(*projected.shape[:3], net.taps)
    scalars = torch.zeros(2, dtype=torch.float64, device=grad.device)
    for band in net.bands():
        images = projected[band.image : band.image + band.images]
        upstream = folded.rows_of(grad, band)
        if net.has_fixup:
            upstream = pixels(grad, band).float()
            inputs = _fixup_inputs(net, band, images, 0)
            before = net.layer(FIXUP0, inputs)
            _add_layer(grads, FIXUP1, upstream, net.activated(before, net.fixup_mask, band), SHARE)
            inner = masked(torch.mm(upstream, net.params[FIXUP1]).mul_(SHARE), net.fixup_mask, band)
            inner = torch.ops.aten.gelu_backward(inner, before)
            _add_layer(grads, FIXUP0, inner, inputs)
            of_inputs = torch.mm(inner, net.params[FIXUP0])
            rows = _band(grad_guidance, band)
            rows += of_inputs[:, net.taps :].reshape(rows.shape)
            upstream = _as_map(upstream + of_inputs[:, : net.taps], band)
        logits = _band(grad_logits, band).permute(0, 3, 1, 2)
        parts = projected.new_empty(_programs(net, band), 2)
        maps = map_of(upstream), map_of(logits)
        _launch(_bilateral_kernels_backward, net, band, images, 0, *maps, parts)
        scalars += parts.sum(0, dtype=torch.float64)
    raw, sigma = net.params[0].double().exp(), net.params[1].double()
    grads[0].copy_(torch.where((raw >= 1e-4) & (raw <= 1e4), scalars[0] * raw, 0.0))
    grads[1].copy_(scalars[1] / sigma**3)
    return grad_logits


def _to_guidance(
    net: Network, projected: Tensor, grad_logits: Tensor, grads: list[Tensor], grad_guidance: Tensor
) -> None:
    """A pixel's projection is the centre of its own window and a neighbour in the windows around it."""
    axes = tuple(folded_axis(n, n, net.diameter, None, "reflect") for n in projected.shape[1:3])
    keys, weights = (x.permute(0, 3, 1, 2) for x in (projected, grad_logits))
    own, others = (torch.empty_like(projected).permute(0, 3, 1, 2) for _ in range(2))
    adaptive_conv(keys, weights, None, axes, own)
    adaptive_conv_backward_source(keys, weights, axes, others)
    own += others
    for band in net.bands():
        upstream, guides = pixels(own, band), net.guides(band)
        before = net.layer(RANGE0, guides)
        _add_layer(grads, RANGE1, upstream, net.activated(before, net.range_mask, band))
        inner = masked(torch.mm(upstream, net.params[RANGE1]), net.range_mask, band)
        inner = torch.ops.aten.gelu_backward(inner, before)
        _add_layer(grads, RANGE0, inner, guides)
        rows = _band(grad_guidance, band)
        rows += torch.mm(inner, net.params[RANGE0]).view(rows.shape)


def _fixup_inputs(net: Network, band: folded.Band, projected: Tensor, top: int) -> Tensor:
    """(pixels, P + G): normalized kernels with the guidance behind them."""
    guides = net.guides(band)
    inputs = projected.new_empty(guides.shape[0], net.taps + guides.shape[1])
    inputs[:, net.taps :] = guides
    _launch(_bilateral_kernels, net, band, projected, top, map_of(_as_map(inputs[:, : net.taps], band)))
    return inputs


def _launch(kernel, net: Network, band: folded.Band, projected: Tensor, top: int, *tensors: Tensor | Map) -> None:
    """``projected`` holds rows from ``top`` on of the band's images."""
    _, _, height, width = net.guidance.shape
    tile = similarity_tile(net.diameter, net.keys)
    kernel[(_programs(net, band),)](
        projected,
        top,
        projected.shape[1],
        net.scalars,
        *tensors,
        height,
        width,
        net.keys,
        band.row,
        band.rows,
        RADIUS=net.radius,
        BLOCK_X=tile.pixels,
        BLOCK_T=tile.taps,
        BLOCK_K=tile.keys,
        num_warps=tile.warps,
    )


def _programs(net: Network, band: folded.Band) -> int:
    tile = similarity_tile(net.diameter, net.keys)
    return band.images * band.rows * launch.cdiv(net.guidance.shape[3], tile.pixels)


def _band(x: Tensor, band: folded.Band) -> Tensor:
    """The band of a (B, H, W, C)."""
    return x[band.image : band.image + band.images, band.row : band.row + band.rows]


def _as_map(x: Tensor, band: folded.Band) -> Tensor:
    """(pixels, C) of a band as (images, C, rows, width)."""
    return x.unflatten(0, (band.images, band.rows, -1)).permute(0, 3, 1, 2)


def _add_layer(grads: list[Tensor], layer: int, upstream: Tensor, inputs: Tensor, share: float = 1.0) -> None:
    """Gradients of a layer's weight and bias, summed over the bands in their order."""
    grads[layer].add_(torch.mm(upstream.t(), inputs), alpha=share)
    grads[layer + 1].add_(upstream.sum(0), alpha=share)
