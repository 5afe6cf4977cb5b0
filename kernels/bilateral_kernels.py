"""Joint bilateral kernels of every pixel of a guidance, and their gradients.

The guidance is projected once, to as many numbers per pixel as there are keys. From there one kernel takes every pixel's
window of the projection to its normalized taps, one goes back to the gradients of the logits, and the unfolded window
exists in neither. The gradient of a logit, <p[window], p[pixel]>, is an adaptive convolution of the projection: by the
logits' gradients for the pixel in the middle, and its adjoint for the pixels around. The 1x1 convolutions are products
of dense matrices, which belong to torch; they run band by band.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import folded, launch
from murf_fast.kernels.adaptive_conv import adaptive_conv, adaptive_conv_backward_source
from murf_fast.window import folded_axis

FIXUP = 0.1  # share of the fix-up in the result


@triton.jit
def _reflect(i, n):
    i = tl.abs(i)
    return (n - 1) - tl.abs((n - 1) - i)


@triton.jit
def _sum_taps(values):
    return tl.sum(tl.sum(values, axis=2), axis=1)[:, None, None]


@triton.jit
def _similarity(projected, temperature, spatial, b, y, x, height, width, keys, RADIUS: tl.constexpr,
                BLOCK_X: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Of every pixel and tap, (x, i, j): logit relative to the largest, softmax, spatial weight; the temperature."""
    TAPS: tl.constexpr = 2 * RADIUS + 1
    i = tl.arange(0, BLOCK_T)[None, :, None]
    j = tl.arange(0, BLOCK_T)[None, None, :]
    column = tl.arange(0, BLOCK_T)
    inside = (x < width)[:, None, None] & (column < TAPS)[None, :, None]
    neighbours = _reflect(x[:, None] + column[None, :] - RADIUS, width)
    image = projected + b.to(tl.int64) * height * width * keys
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
    scale = tl.load(temperature)
    similarity = tl.where(valid, tl.exp(scale * relative), 0.0)
    similarity /= _sum_taps(similarity)
    gaussian = tl.load(spatial + i * TAPS + j, mask=valid, other=0.0)
    return tl.where(valid, relative, 0.0), similarity, gaussian, scale


@triton.jit
def _pixels(row, rows, image, width, BLOCK_X: tl.constexpr):
    """This program's (local image, local row, image, row, columns) in a band."""
    x_tiles = tl.cdiv(width, BLOCK_X)
    line = tl.program_id(0) // x_tiles
    x = (tl.program_id(0) % x_tiles) * BLOCK_X + tl.arange(0, BLOCK_X)
    return line // rows, line % rows, image + line // rows, row + line % rows, x


@triton.jit
def _taps(data, stride_b, stride_t, stride_y, stride_x, b, y, x, width, RADIUS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Pointers (x, i, j) to the taps of some pixels, and which exist."""
    i = tl.arange(0, BLOCK_T)[None, :, None]
    j = tl.arange(0, BLOCK_T)[None, None, :]
    pixels = data + b.to(tl.int64) * stride_b + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    inside = (x < width)[:, None, None] & ((i < 2 * RADIUS + 1) & (j < 2 * RADIUS + 1))
    return pixels[:, None, None] + (i * (2 * RADIUS + 1) + j).to(tl.int64) * stride_t, inside


@triton.jit
def _bilateral_kernels(projected, temperature, spatial, out, stride_b, stride_t, stride_y, stride_x,
                       height, width, keys, image, row, rows, RADIUS: tl.constexpr,
                       BLOCK_X: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Normalized kernels of a band's pixels, before the fix-up."""
    local, line, b, y, x = _pixels(row, rows, image, width, BLOCK_X)
    _, similarity, gaussian, _ = _similarity(
        projected, temperature, spatial, b, y, x, height, width, keys, RADIUS, BLOCK_X, BLOCK_T, BLOCK_K
    )
    weighted = similarity * gaussian
    result = weighted / tl.maximum(_sum_taps(weighted), 1e-7)
    pointers, inside = _taps(out, stride_b, stride_t, stride_y, stride_x, local, line, x, width, RADIUS, BLOCK_T)
    tl.store(pointers, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _bilateral_kernels_backward(projected, temperature, spatial, distance, grad, grad_logits, grad_scalars,
                                stride_b, stride_t, stride_y, stride_x, height, width, keys, image, row, rows,
                                RADIUS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_T: tl.constexpr,
                                BLOCK_K: tl.constexpr):  # fmt: skip
    """From gradients of normalized kernels to those of the logits, and this program's part of the two scalars'."""
    local, line, b, y, x = _pixels(row, rows, image, width, BLOCK_X)
    relative, similarity, gaussian, scale = _similarity(
        projected, temperature, spatial, b, y, x, height, width, keys, RADIUS, BLOCK_X, BLOCK_T, BLOCK_K
    )
    pointers, inside = _taps(grad, stride_b, stride_t, stride_y, stride_x, local, line, x, width, RADIUS, BLOCK_T)
    upstream = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    # kernels = similarity * spatial / total, unless the clamp holds
    weighted = similarity * gaussian
    total = _sum_taps(weighted)
    inverse = 1.0 / tl.maximum(total, 1e-7)
    mean = tl.where(total < 1e-7, 0.0, _sum_taps(upstream * weighted) * inverse)
    slope = tl.where(inside, (upstream - mean) * inverse, 0.0)
    i, j = tl.arange(0, BLOCK_T)[None, :, None], tl.arange(0, BLOCK_T)[None, None, :]
    inside_window = (i < 2 * RADIUS + 1) & (j < 2 * RADIUS + 1)
    squared = tl.load(distance + i * (2 * RADIUS + 1) + j, mask=inside_window, other=0.0)
    of_spatial = tl.sum(_sum_taps(slope * weighted * squared))
    # similarity = softmax(temperature * logits)
    slope *= gaussian
    slope = (slope - _sum_taps(slope * similarity)) * similarity
    of_temperature = tl.sum(_sum_taps(slope * relative))
    taps: tl.constexpr = (2 * RADIUS + 1) * (2 * RADIUS + 1)
    pointers, inside = _taps(
        grad_logits, taps * height.to(tl.int64) * width, 1, width.to(tl.int64) * taps, taps, b, y, x, width, RADIUS,
        BLOCK_T
    )  # fmt: skip
    tl.store(pointers, slope * scale, mask=inside)
    tl.store(grad_scalars + 2 * tl.program_id(0), of_temperature)
    tl.store(grad_scalars + 2 * tl.program_id(0) + 1, of_spatial)


class _Network:
    """The parameters in float32, and the images of a band in the shapes that the layers take."""

    def __init__(self, guidance: Tensor, params: list[Tensor], range_mask, fixup_mask, radius: int):
        self.guidance, self.radius, self.diameter = guidance, radius, 2 * radius + 1
        self.taps, self.keys = self.diameter**2, params[3].numel()
        self.params = [p.detach().float().contiguous() for p in params]
        self.params[2::2] = [w.flatten(1) for w in self.params[2::2]]
        self.range_mask, self.fixup_mask = range_mask, fixup_mask
        # Rounded once: every pixel has the same error in them, which the gradients of parameters add up.
        temp, sigma = self.params[0].double(), self.params[1].double()
        offset = torch.linspace(-1, 1, self.diameter, dtype=torch.float64, device=guidance.device).square()
        distance = offset[:, None] + offset
        self.temperature, self.distance = temp.exp().clamp(1e-4, 1e4).float(), distance.float()
        self.spatial = torch.exp(-distance / (2 * sigma.square())).float()

    @property
    def has_fixup(self) -> bool:
        return len(self.params) > 6

    def bands(self, channels: int):
        batch, _, height, width = self.guidance.shape
        return folded.bands(batch, height, width * channels * 4, 1)

    def guides(self, band: folded.Band) -> Tensor:
        """(pixels, G) float32"""
        return pixels(self.guidance, band).float()

    def hidden(self, inputs: Tensor, layer: int, mask: Tensor | None, band: folded.Band) -> tuple[Tensor, Tensor]:
        """A hidden layer before and after its activation."""
        before = torch.addmm(self.params[layer + 1], inputs, self.params[layer].t())
        return before, masked(F.gelu(before), mask, band)

    def project(self) -> Tensor:
        """(B, H, W, K)"""
        batch, _, height, width = self.guidance.shape
        out = self.params[0].new_empty(batch, height, width, self.keys)
        for band in self.bands(self.keys):
            _, hidden = self.hidden(self.guides(band), 2, self.range_mask, band)
            rows = out[band.image : band.image + band.images, band.row : band.row + band.rows]
            rows.copy_(torch.addmm(self.params[5], hidden, self.params[4].t()).view(rows.shape))
        return out

    def launch(self, kernel, band: folded.Band, projected: Tensor, *tensors: Tensor, strides) -> None:
        _, _, height, width = self.guidance.shape
        tile = launch.similarity_tile(self.diameter, self.keys)
        kernel[(self.programs(band),)](
            projected,
            self.temperature,
            self.spatial,
            *tensors,
            *strides,
            height,
            width,
            self.keys,
            band.image,
            band.row,
            band.rows,
            RADIUS=self.radius,
            BLOCK_X=tile.pixels,
            BLOCK_T=tile.taps,
            BLOCK_K=tile.keys,
            num_warps=tile.warps,
        )

    def programs(self, band: folded.Band) -> int:
        tile = launch.similarity_tile(self.diameter, self.keys)
        return band.images * band.rows * triton.cdiv(self.guidance.shape[3], tile.pixels)

    def fixup_inputs(self, projected: Tensor, band: folded.Band) -> Tensor:
        """(pixels, P + G): normalized kernels with the guidance behind them."""
        width, channels = self.guidance.shape[3], self.taps + self.guidance.shape[1]
        inputs = projected.new_empty(band.images, band.rows, width, channels)
        stride_b, stride_y, stride_x, stride_t = inputs.stride()
        strides = (stride_b, stride_t, stride_y, stride_x)
        self.launch(_bilateral_kernels, band, projected, inputs, strides=strides)
        inputs = inputs.flatten(0, 2)
        inputs[:, self.taps :] = self.guides(band)
        return inputs


def rows_of(x: Tensor, band: folded.Band) -> Tensor:
    return x[band.image : band.image + band.images, :, band.row : band.row + band.rows]


def pixels(x: Tensor, band: folded.Band) -> Tensor:
    """(pixels, channels) of a band of a map (B, C, H, W)."""
    return rows_of(x, band).permute(0, 2, 3, 1).flatten(0, 2)


def masked(x: Tensor, mask: Tensor | None, band: folded.Band) -> Tensor:
    """``x`` (pixels, channels) times its images' factors."""
    if mask is None:
        return x
    factors = mask[band.image : band.image + band.images].float()
    return x.view(band.images, -1, x.shape[1]).mul_(factors[:, None]).view(x.shape)


def bilateral_kernels(
    guidance: Tensor,
    params: list[Tensor],
    range_mask: Tensor | None,
    fixup_mask: Tensor | None,
    radius: int,
    out: Tensor,
) -> None:
    """``out`` (B, D * D, H, W) of any strides."""
    with launch.on_device_of(guidance), _without_autocast(guidance):
        net = _Network(guidance, params, range_mask, fixup_mask, radius)
        projected = net.project()
        for band in net.bands(net.taps):
            rows = rows_of(out, band)
            if not net.has_fixup:
                net.launch(_bilateral_kernels, band, projected, rows, strides=rows.stride())
                continue
            inputs = net.fixup_inputs(projected, band)
            _, hidden = net.hidden(inputs, 6, fixup_mask, band)
            change = torch.addmm(net.params[9], hidden, net.params[8].t())
            result = torch.add(inputs[:, : net.taps], change, alpha=FIXUP)
            rows.copy_(result.view(band.images, band.rows, -1, net.taps).permute(0, 3, 1, 2))


def bilateral_kernels_backward(
    grad: Tensor,
    guidance: Tensor,
    params: list[Tensor],
    range_mask: Tensor | None,
    fixup_mask: Tensor | None,
    radius: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of the guidance (B, G, H, W) and of the concatenated parameters, both float32."""
    with launch.on_device_of(guidance), _without_autocast(guidance):
        net = _Network(guidance, params, range_mask, fixup_mask, radius)
        grads = [torch.zeros_like(p) for p in net.params]
        projected = net.project()
        batch, guides, height, width = guidance.shape
        grad_guidance = projected.new_zeros(batch, height, width, guides).permute(0, 3, 1, 2)
        grad_logits = _to_logits(net, grad, projected, grads, grad_guidance)
        _to_guidance(net, projected, grad_logits, grads, grad_guidance)
        return grad_guidance, torch.cat([g.flatten() for g in grads])


def _to_logits(
    net: _Network, grad: Tensor, projected: Tensor, grads: list[Tensor], grad_guidance: Tensor
) -> Tensor:
    """Gradients of the logits (B, D * D, H, W); adds those of the fix-up and of the scalars."""
    batch, _, height, width = grad.shape
    grad_logits = projected.new_empty(batch, height, width, net.taps)
    scalars = torch.zeros(2, dtype=torch.float64, device=grad.device)
    for band in net.bands(net.taps):
        upstream = rows_of(grad, band)
        if net.has_fixup:
            upstream = pixels(grad, band).float()
            inputs = net.fixup_inputs(projected, band)
            before, hidden = net.hidden(inputs, 6, net.fixup_mask, band)
            _add_layer(grads, 8, upstream, hidden, FIXUP)
            inner = masked(torch.mm(upstream, net.params[8]).mul_(FIXUP), net.fixup_mask, band)
            inner = torch.ops.aten.gelu_backward(inner, before)
            _add_layer(grads, 6, inner, inputs)
            of_inputs = torch.mm(inner, net.params[6])
            _add(grad_guidance, band, of_inputs[:, net.taps :])
            upstream = of_inputs[:, : net.taps].add_(upstream).view(band.images, band.rows, width, net.taps)
            upstream = upstream.permute(0, 3, 1, 2)
        parts = projected.new_empty(net.programs(band), 2)
        net.launch(
            _bilateral_kernels_backward,
            band,
            projected,
            net.distance,
            upstream,
            grad_logits,
            parts,
            strides=upstream.stride(),
        )
        scalars += parts.sum(0, dtype=torch.float64)
    raw, sigma = net.params[0].double().exp(), net.params[1].double()
    grads[0].copy_(torch.where((raw >= 1e-4) & (raw <= 1e4), scalars[0] * raw, 0.0))
    grads[1].copy_(scalars[1] / sigma**3)
    return grad_logits.permute(0, 3, 1, 2)


def _to_guidance(
    net: _Network, projected: Tensor, grad_logits: Tensor, grads: list[Tensor], grad_guidance: Tensor
) -> None:
    """A pixel's projection is the centre of its own window and a neighbour in the windows around it."""
    height, width = net.guidance.shape[2:]
    axes = tuple(folded_axis(n, n, net.diameter, None, "reflect") for n in (height, width))
    keys = projected.permute(0, 3, 1, 2)
    own, others = (torch.empty_like(projected).permute(0, 3, 1, 2) for _ in range(2))
    adaptive_conv(keys, grad_logits, None, axes, own)
    adaptive_conv_backward_source(keys, grad_logits, axes, others)
    own += others
    for band in net.bands(net.keys):
        upstream, guides = pixels(own, band), net.guides(band)
        before, hidden = net.hidden(guides, 2, net.range_mask, band)
        _add_layer(grads, 4, upstream, hidden)
        inner = masked(torch.mm(upstream, net.params[4]), net.range_mask, band)
        inner = torch.ops.aten.gelu_backward(inner, before)
        _add_layer(grads, 2, inner, guides)
        _add(grad_guidance, band, torch.mm(inner, net.params[2]))


def _add_layer(grads: list[Tensor], layer: int, upstream: Tensor, inputs: Tensor, share: float = 1.0) -> None:
    """Gradients of a layer's weight and bias, summed over the bands in their order."""
    grads[layer].addmm_(upstream.t(), inputs, alpha=share)
    grads[layer + 1].add_(upstream.sum(0), alpha=share)


def _add(grad_guidance: Tensor, band: folded.Band, change: Tensor) -> None:
    rows = rows_of(grad_guidance, band).permute(0, 2, 3, 1)
    rows += change.reshape(rows.shape)


def _without_autocast(x: Tensor):
    return torch.autocast(x.device.type, enabled=False)
