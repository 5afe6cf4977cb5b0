"""The parameters of `bilateral_kernels` and its pairs of 1x1 convolutions. They run band by band: forward as one launch
for both layers, whose hidden channels exist in no memory; backward as products of torch, on the pixels of a band as the
rows of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import folded, launch
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.launch import map_of

# First parameter of each layer: weight, and bias behind it.
RANGE0, RANGE1, FIXUP0, FIXUP1 = 2, 4, 6, 8
SHARE = 0.1  # of the fix-up in the result


class Scalars(NamedTuple):
    """Both of one element, of any floating dtype."""

    range_temp: Tensor
    sigma_spatial: Tensor


class Layers(NamedTuple):
    """Two 1x1 convolutions: weights (hidden, inputs) and (outputs, hidden), biases, and factors of the hidden channels
    (images, hidden), if any. Contiguous, in float32: a product with weights converted in the kernel from a half dtype
    becomes one of TF32 on sm_100, whatever precision is asked for (Triton 3.6)."""

    weight0: Tensor
    bias0: Tensor
    weight1: Tensor
    bias1: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class LayersTile:
    """One program: pixels, and inputs, hidden channels and outputs at a time; its warps, and the registers of a
    thread.
    """

    pixels: int
    inputs: int
    hidden: int
    outputs: int
    warps: int
    registers: int


def layers_tile(hidden: int, outputs: int, precision: str, architecture: int) -> LayersTile:
    """64 pixels times at most 64 hidden channels and 64 outputs are two sums of 16 registers for each of 256 threads;
    four warps spilled, as operands wait in registers, too, and so do the 128 registers that ptxas takes for sm_89 where
    nobody says how many. On sm_90 there is room for 128 pixels, which read the weights half as often: 0.68 for 0.90 ms
    on an H200, but not in TF32. More outputs are other programs', which make the hidden channels again: so it is from a
    radius of 4 on.
    """
    block = [max(16, min(launch.power_of_two(n), 64)) for n in (hidden, outputs)]
    if max(block) < 64:
        return LayersTile(64, 16, *block, 4, 255)
    return LayersTile(128 if 90 <= architecture < 100 and precision != "tf32" else 64, 16, *block, 8, 255)


@kernel
def _two_layers(taps, count, guidance, layers, out, pixels, plane, width, guides, hidden, outputs, SHARE: tl.constexpr,
                BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """``out = W1 (mask gelu(W0 x + b0)) + b1`` of every pixel. The inputs x are its ``count`` taps (pixels, count), if
    there are any, then its guides; and the result is added to the taps, SHARE of it.
    """
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    exists = p < pixels
    image, line, x = p // plane, p % plane // width, p % width
    source = guidance.data + image.to(tl.int64) * guidance.stride_b
    source += line.to(tl.int64) * guidance.stride_y + x.to(tl.int64) * guidance.stride_x
    inputs = count + guides
    total = tl.zeros((BLOCK_P, BLOCK_O), dtype=tl.float32)
    start = 0
    while start < hidden:
        h = start + tl.arange(0, BLOCK_H)
        bias = tl.load(layers.bias0 + h, mask=h < hidden, other=0.0)
        before = tl.zeros((BLOCK_P, BLOCK_H), dtype=tl.float32) + bias[None, :]
        if taps is not None:
            begin = 0
            while begin < count:
                i = begin + tl.arange(0, BLOCK_I)
                mask = exists[:, None] & (i < count)[None, :]
                value = tl.load(taps + (p.to(tl.int64) * count)[:, None] + i[None, :], mask=mask, other=0.0)
                mask = (h < hidden)[None, :] & (i < count)[:, None]
                weight = tl.load(layers.weight0 + (h * inputs)[None, :] + i[:, None], mask=mask, other=0.0)
                before = tl.dot(value, weight, before, input_precision=PRECISION)
                begin += BLOCK_I
        # Three guides as a rule: a product of matrices would have sixteen.
        g = 0
        while g < guides:
            value = tl.load(source + tl.cast(g, tl.int64) * guidance.stride_c, mask=exists, other=0.0).to(tl.float32)
            weight = tl.load(layers.weight0 + h * inputs + count + g, mask=h < hidden, other=0.0)
            before += value[:, None] * weight[None, :]
            g += 1
        active = 0.5 * before * (1.0 + tl.erf(before * 0.7071067811865476))
        if layers.mask is not None:
            at = (image * hidden)[:, None] + h[None, :]
            active *= tl.load(layers.mask + at, mask=exists[:, None] & (h < hidden)[None, :], other=0.0)
        mask = (h < hidden)[:, None] & (o < outputs)[None, :]
        weight = tl.load(layers.weight1 + (o * hidden)[None, :] + h[:, None], mask=mask, other=0.0)
        total = tl.dot(active, weight, total, input_precision=PRECISION)
        start += BLOCK_H
    total += tl.load(layers.bias1 + o, mask=o < outputs, other=0.0)[None, :]
    mask = exists[:, None] & (o < outputs)[None, :]
    if taps is not None:
        kept = tl.load(taps + (p.to(tl.int64) * count)[:, None] + o[None, :], mask=mask, other=0.0)
        total = kept + SHARE * total
    at = out.data + image.to(tl.int64) * out.stride_b + line.to(tl.int64) * out.stride_y + x.to(tl.int64) * out.stride_x
    at = at[:, None] + (o.to(tl.int64) * out.stride_c)[None, :]
    tl.store(at, total.to(out.data.dtype.element_ty), mask=mask)


class Network:
    """The parameters, and what becomes of a guidance by them."""

    def __init__(
        self,
        guidance: Tensor,
        params: list[Tensor],
        range_mask: Tensor | None,
        fixup_mask: Tensor | None,
        radius: int,
    ):
        self.guidance, self.radius, self.diameter = guidance, radius, 2 * radius + 1
        self.taps, self.keys = self.diameter**2, params[3].numel()
        self.scalars = Scalars(*(p.detach() for p in params[:2]))
        self.layers = [p.detach().float().contiguous() for p in params[2:]]
        self.range_mask, self.fixup_mask = (
            mask.float().contiguous() if mask is not None else None for mask in (range_mask, fixup_mask)
        )

    @cached_property
    def params(self) -> list[Tensor]:
        """In float32, in the shapes that torch's products take."""
        return [*(p.float() for p in self.scalars), *(p.flatten(1) if p.ndim == 4 else p for p in self.layers)]

    @property
    def has_fixup(self) -> bool:
        return len(self.layers) > FIXUP0 - RANGE0

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.guidance.device)

    def bands(self, step: int = 1, row_bytes: int = 0, rows: int | None = None) -> Iterator[folded.Band]:
        """Bands for ``rows`` (None: all) of kernels and projections, and of ``row_bytes`` that somebody else needs."""
        batch, _, height, width = self.guidance.shape
        rows = height if rows is None else rows
        return folded.bands(batch, rows, max(width * max(self.taps, self.keys) * 4, row_bytes), step)

    def project(self, band: folded.Band) -> Tensor:
        """(images, rows, width, K) float32"""
        out = self.empty(band.images, band.rows, self.guidance.shape[3], self.keys)
        self._layers(RANGE0, None, band, out.permute(0, 3, 1, 2), self.range_mask)
        return out

    def correct(self, normalized: Tensor, band: folded.Band, out: Tensor) -> None:
        """``out`` (images, D * D, rows, width) of any strides, of ``normalized`` (images, rows, width, D * D)."""
        self._layers(FIXUP0, normalized, band, out, self.fixup_mask)

    def _layers(self, first: int, taps: Tensor | None, band: folded.Band, out: Tensor, mask: Tensor | None) -> None:
        images, outputs, rows, width = out.shape
        layers = self.layers[first - RANGE0 : first - RANGE0 + 4]
        hidden, guides = layers[1].numel(), self.guidance.shape[1]
        precision = launch.dot_precision()
        tile = layers_tile(hidden, outputs, precision, launch.architecture(out.device))
        pixels = images * rows * width
        mask = None if mask is None else mask[band.image : band.image + band.images]
        _two_layers[(launch.cdiv(pixels, tile.pixels), launch.cdiv(outputs, tile.outputs))](
            taps,
            0 if taps is None else self.taps,
            map_of(folded.rows_of(self.guidance, band)),
            Layers(*layers, mask),
            map_of(out),
            pixels,
            rows * width,
            width,
            guides,
            hidden,
            outputs,
            SHARE=SHARE,
            BLOCK_P=tile.pixels,
            BLOCK_I=tile.inputs,
            BLOCK_H=tile.hidden,
            BLOCK_O=tile.outputs,
            PRECISION=precision,
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )

    def guides(self, band: folded.Band) -> Tensor:
        """(pixels, G) float32"""
        return pixels(self.guidance, band).float()

    def layer(self, first: int, inputs: Tensor) -> Tensor:
        return torch.addmm(self.params[first + 1], inputs, self.params[first].t())

    def activated(self, before: Tensor, mask: Tensor | None, band: folded.Band) -> Tensor:
        return masked(F.gelu(before), mask, band)


def pixels(x: Tensor, band: folded.Band) -> Tensor:
    """The band of a map (B, C, H, W) as (pixels, C)."""
    return folded.rows_of(x, band).permute(0, 2, 3, 1).flatten(0, 2)


def masked(x: Tensor, mask: Tensor | None, band: folded.Band) -> Tensor:
    """``x`` (pixels, channels) times the factors of its images, in place."""
    if mask is None:
        return x
    factors = mask[band.image : band.image + band.images]
    return x.view(band.images, -1, x.shape[1]).mul_(factors[:, None]).view(x.shape)


def without_autocast(x: Tensor) -> torch.autocast:
    """The products stay float32 whatever the caller's autocast says."""
    return torch.autocast(x.device.type, enabled=False)
