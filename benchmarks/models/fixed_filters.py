"""The baselines with nothing learned: features of a small ViT at the image's size, and logits smoothed along its edges.

Plain PyTorch is each formula as people write it: all weights of a band of rows and a product with the features, or tap
after tap; box means by pooling, or by cumulative sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from inputs import CL, guidance_of, randn, up
from registry import Contenders, Target, case, classes, side
from torch import Tensor

from murf_fast.nn import FixedJBU, GuidedFilter
from murf_fast.reference.fixed_jbu import fixed_jbu
from murf_fast.reference.guided_filter import guided_filter

SPATIAL, RANGE, RADIUS, BAND = 1.0, 0.3, 2, 16
EPS = 1e-2


def tap_after_tap(source: Tensor, guidance: Tensor) -> Tensor:
    """Cells are gathered for every pixel, one offset at a time; scores are kept, and normalized at the end."""
    (h, w), (height, width) = source.shape[2:], guidance.shape[2:]
    y, x = (
        (torch.arange(n, device=source.device, dtype=guidance.dtype) + 0.5) * m / n - 0.5
        for n, m in ((height, h), (width, w))
    )
    low, rows = F.adaptive_avg_pool2d(guidance, (h, w)), source[0].flatten(1).T
    result, total = 0, 0
    for dy in range(-RADIUS, RADIUS + 2):
        for dx in range(-RADIUS, RADIUS + 2):
            i, j = y.floor().long() + dy, x.floor().long() + dx
            inside = ((i >= 0) & (i < h) & ((y - i).abs() <= RADIUS))[:, None]
            inside = inside & (j >= 0) & (j < w) & ((x - j).abs() <= RADIUS)
            cells = (i.clamp(0, h - 1)[:, None] * w + j.clamp(0, w - 1)).flatten()
            away = ((y - i) ** 2)[:, None] + (x - j) ** 2
            tone = (guidance[0] - low[0].flatten(1)[:, cells].view(guidance.shape[1:])).square().sum(0)
            weight = (-away / (2 * SPATIAL**2) - tone / (2 * RANGE**2)).exp() * inside
            result = result + rows.index_select(0, cells) * weight.view(-1, 1)
            total = total + weight
    return (result / total.view(-1, 1)).T.unflatten(1, (height, width))[None]


def in_bands(source: Tensor, guidance: Tensor) -> Tensor:
    """All weights of a few rows at a time."""
    (h, w), (height, width) = source.shape[2:], guidance.shape[2:]
    y, x = ((torch.arange(n, device=source.device, dtype=guidance.dtype) + 0.5) * m / n - 0.5
            for n, m in ((height, h), (width, w)))  # fmt: skip
    of_y, of_x = (p[:, None] - torch.arange(m, device=p.device) for p, m in ((y, h), (x, w)))
    of_y, of_x = ((-(d**2) / (2 * SPATIAL**2)).masked_fill(d.abs() > RADIUS, -torch.inf) for d in (of_y, of_x))
    guidance = guidance - guidance.mean((2, 3), keepdim=True)
    keys, rows = F.adaptive_avg_pool2d(guidance, (h, w))[0].flatten(1), source[0].flatten(1).T
    square, bands = keys.square().sum(0) / 2, []
    for band in torch.arange(height, device=source.device).split(BAND):
        here = slice(int(band[0]), int(band[-1]) + 1)
        scores = (guidance[0, :, here].flatten(1).T @ keys - square) / RANGE**2
        scores = scores + (of_y[here, None, :, None] + of_x[None, :, None]).flatten(2).flatten(0, 1)
        bands.append(scores.softmax(1) @ rows)
    return torch.cat(bands).T.unflatten(1, (height, width))[None]


@case("fixed_filters", "FixedJBU, 384 channels, 32^2 -> 448^2", targets=(Target("eager", 4.0),))
def jbu(device, dtype):
    n, size = side(32), side(448)
    source = randn(device, dtype, 1, classes(384), n, n, memory_format=CL)
    guidance, model = guidance_of(device, dtype, (size, size)), FixedJBU(SPATIAL, RANGE, RADIUS)

    def oracle():
        where = (slice(None), slice(None, None, max(1, source.shape[1] // 7)))
        yield where, fixed_jbu(source[where].double(), guidance.double(), SPATIAL, RANGE, RADIUS)

    return Contenders(
        lambda: model(source, guidance),
        {
            "eager, all weights in bands": lambda: in_bands(source, guidance),
            "eager, tap after tap": lambda: tap_after_tap(source, guidance),
        },
        oracle,
        source.shape[1] * size * size * source.element_size(),
    )


def by_sums(source: Tensor, guidance: Tensor, radius: int) -> Tensor:
    """The guided filter with box means from cumulative sums, in float64 as float32 has not the digits for them."""

    def box(x: Tensor) -> Tensor:
        for dim in (2, 3):
            n, at = x.shape[dim], torch.arange(x.shape[dim], device=x.device)
            sums = F.pad(x.double().cumsum(dim), (1, 0) if dim == 3 else (0, 0, 1, 0))
            low, high = (at - radius).clamp(min=0), (at + radius + 1).clamp(max=n)
            counts = (high - low).view(-1, *[1] * (3 - dim))
            x = ((sums.index_select(dim, high) - sums.index_select(dim, low)) / counts).to(x.dtype)
        return x

    size, grid, guides = guidance.shape[2:], source.shape[2:], guidance.shape[1]
    i = F.adaptive_avg_pool2d(guidance, grid)
    mean_i, mean_p = box(i), box(source)
    corr_ii, corr_ip = (box((i[:, :, None] * x[:, None]).flatten(1, 2)) for x in (i, source))
    var = corr_ii.unflatten(1, (guides, -1)) - mean_i[:, :, None] * mean_i[:, None]
    cov = corr_ip.unflatten(1, (guides, -1)) - mean_i[:, :, None] * mean_p[:, None]
    var = var.permute(0, 3, 4, 1, 2) + EPS * torch.eye(guides, dtype=source.dtype, device=source.device)
    a = torch.linalg.solve(var, cov.permute(0, 3, 4, 1, 2)).permute(0, 3, 4, 1, 2)
    b = mean_p - (a * mean_i[:, :, None]).sum(1)
    mean_a, mean_b = (x if grid == size else up(x, size) for x in (box(a.flatten(1, 2)), box(b)))
    return (mean_a.unflatten(1, (guides, -1)) * guidance[:, :, None]).sum(1) + mean_b


def filtered(device, dtype, channels: int, coarse: int, fine: int, radius: int) -> Contenders:
    n, size = side(coarse), side(fine)
    source = randn(device, dtype, 1, classes(channels), n, n, memory_format=CL)
    guidance, model = guidance_of(device, dtype, (size, size)), GuidedFilter(radius, EPS)
    planar = source.contiguous()

    def oracle():
        where = (slice(None), slice(None, None, max(1, source.shape[1] // 7)))
        yield where, guided_filter(source[where].double(), guidance.double(), radius, EPS)

    return Contenders(
        lambda: model(source, guidance),
        {
            "eager, pooling, channels_last": lambda: guided_filter(source, guidance, radius, EPS),
            "eager, pooling, contiguous": lambda: guided_filter(planar, guidance, radius, EPS),
            "eager, cumulative sums": lambda: by_sums(planar, guidance, radius),
        },
        oracle,
        source.shape[1] * size * size * source.element_size(),
    )


@case("fixed_filters", "GuidedFilter, 384 channels, 32^2 -> 448^2", targets=(Target("eager", 2.0),), capturable=False)
def upsampled(device, dtype):
    return filtered(device, dtype, 384, 32, 448, 2)


@case("fixed_filters", "GuidedFilter, 21 channels of 448^2", targets=(Target("eager", 1.0),), capturable=False)
def smoothed(device, dtype):
    return filtered(device, dtype, 21, 448, 448, 8)
