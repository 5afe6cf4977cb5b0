"""Upsample Anything: a step of its optimization, the whole of it, and the features at the image's size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from inputs import CL, guidance_of, randn, up
from registry import Contenders, Target, case, classes, configurations, side, smallest
from tiny import backward
from torch import Tensor

import murf_fast
from murf_fast.nn import UpsampleAnything

RADIUS = 8


def plain(features: Tensor, guidance: Tensor, *maps: Tensor) -> Tensor:
    """One image, all offsets at once, as its authors train it: maps gathered for every pixel and offset."""
    sigma_x, sigma_y, theta, sigma_r = maps
    (h, w), (height, width) = features.shape[2:], guidance.shape[2:]
    device, dtype = features.device, guidance.dtype
    y, x = (torch.arange(n, device=device) for n in (height, width))
    offset = torch.arange(-RADIUS, RADIUS + 1, device=device)
    row = (torch.div((2 * y + 1) * h, 2 * height, rounding_mode="floor") + offset[:, None]).clamp(0, h - 1)
    column = (torch.div((2 * x + 1) * w, 2 * width, rounding_mode="floor") + offset[:, None]).clamp(0, w - 1)
    index = (row[:, None, :, None] * w + column[None, :, None, :]).flatten(0, 1)
    dy = (y + 0.5).to(dtype) - (row + 0.5).to(dtype) * (height / h)
    dx = (x + 0.5).to(dtype) - (column + 0.5).to(dtype) * (width / w)
    dy, dx = dy[:, None, :, None], dx[None, :, None, :]

    def read(values: Tensor) -> Tensor:
        return values.flatten().index_select(0, index.flatten()).view(index.shape)

    sigmas = [read(s.clamp_min(1e-6)).unflatten(0, (len(offset), -1)) for s in (sigma_x, sigma_y)]
    angle = read(theta).unflatten(0, (len(offset), -1))
    along, across = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
    logs = -(along**2) / (2 * sigmas[0] ** 2 + 1e-8) - across**2 / (2 * sigmas[1] ** 2 + 1e-8)
    low = up(guidance, (h, w))
    square = sum((guidance[0, c] - read(low[0, c])) ** 2 for c in range(guidance.shape[1]))
    logs = logs.flatten(0, 1) - square / (2 * read(sigma_r.clamp_min(1e-6)) ** 2 + 1e-8)
    larger = F.interpolate(torch.maximum(sigma_x, sigma_y).detach(), (height, width), mode="bilinear")[0, 0]
    limit = (2 * larger).ceil().clamp(1, RADIUS)
    far = (offset[:, None] ** 2 + offset**2).flatten()[:, None, None]
    weights = logs.masked_fill(far > limit**2, -torch.inf).softmax(0)
    rows = features[0].flatten(1).T
    result = 0
    for first in range(0, len(weights), 49):  # all of them have no room for many channels
        part = slice(first, first + 49)
        taken = rows.index_select(0, index[part].flatten()).view(*index[part].shape, -1)
        result = result + (taken * weights[part, :, :, None].to(rows.dtype)).sum(0)
    return result.permute(2, 0, 1)[None]


def cell_maps(device, n: int) -> list[Tensor]:
    """Kernels of the size that an optimization finds."""
    draws = [randn(device, torch.float32, 1, 1, n, n + i)[..., :n] for i in range(4)]
    sigma_x, sigma_y, theta, sigma_r = draws
    return [16 * (0.3 * sigma_x).exp(), 16 * (0.3 * sigma_y).exp(), theta, 0.1 * (0.3 * sigma_r).exp()]


@case(
    "gaussian_bilateral_upsample",
    "384 channels, 16^2 -> 224^2",
    targets=(Target("eager", 20.0),),
)
def result(device, dtype):
    n, size, channels = side(16), side(224), classes(384)
    features = randn(device, dtype, 1, channels, n, n, memory_format=CL)
    guidance, maps = guidance_of(device, dtype, (size, size)), cell_maps(device, n)

    def oracle():
        exact = [m.double() for m in maps]
        where = (slice(None), slice(None, None, max(1, channels // 3)))
        yield where, plain(features[where].double(), guidance.double(), *exact)

    return Contenders(
        lambda: murf_fast.gaussian_bilateral_upsample(features, guidance, *maps),
        {"eager": lambda: plain(features, guidance, *maps)},
        oracle,
        channels * size * size * features.element_size(),
        operations=2 * channels * size * size * min(n * n, 197),
    )


@case(
    "gaussian_bilateral_upsample",
    "a step of the optimization: an image of 224^2 from 16^2, forward and backward",
    targets=(Target("eager", 20.0),),
    capturable=False,
)
def step(device, dtype):
    n, size = side(16), side(224)
    image, maps = guidance_of(device, dtype, (size, size)), [m.requires_grad_() for m in cell_maps(device, n)]
    low = up(image, (n, n), "bicubic")
    direction = randn(device, dtype, 1, 3, size, size)

    def gradients(result: Tensor, leaves: list[Tensor]) -> Tensor:
        made = torch.autograd.grad(result, leaves, direction.to(result.dtype))
        return torch.cat([(g / g.detach().abs().max().clamp_min(1e-30)).flatten() for g in made])

    def oracle():
        leaves = [m.detach().double().requires_grad_() for m in maps]
        yield (), gradients(plain(low.double(), image.double(), *leaves), leaves)

    return Contenders(
        lambda: gradients(murf_fast.gaussian_bilateral_upsample(low, image, *maps), maps),
        {"eager": lambda: gradients(plain(low, image, *maps), maps)},
        oracle,
        image.numel() * image.element_size(),
    )


@case(
    "gaussian_bilateral_upsample",
    "Upsample Anything, 384 channels, 16^2 -> 224^2, ten steps",
    targets=(Target("eager", 20.0),),
    capturable=False,
)
def upsample_anything(device, dtype):
    n, size, channels, steps = side(16), side(224), classes(384), 10
    features = randn(device, dtype, 1, channels, n, n, memory_format=CL)
    image = guidance_of(device, dtype, (size, size)).sigmoid()
    model = UpsampleAnything(steps=steps)

    def eager(precision: torch.dtype, steps: int = steps) -> Tensor:
        exact = image.to(precision)
        low = up(exact, (n, n), "bicubic")
        begin = torch.tensor([math.log(16), math.log(16), 0, math.log(0.12)], dtype=precision, device=device)
        raw = begin.view(4, 1, 1, 1, 1).repeat(1, 1, 1, n, n).requires_grad_()
        adam = torch.optim.Adam([raw], lr=0.1)
        rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1e-8 ** (step / 5100))
        for _ in range(steps):
            adam.zero_grad()
            F.l1_loss(plain(low, exact, *maps_of(raw)), exact).backward()
            adam.step()
            rate.step()
        with torch.no_grad():
            return plain(features.to(precision), exact, *maps_of(raw))

    def maps_of(raw: Tensor) -> tuple[Tensor, ...]:
        return raw[0].exp(), raw[1].exp(), math.pi * raw[2].tanh(), raw[3].exp()

    def oracle():
        yield (), eager(torch.float64)

    return Contenders(
        lambda: model(image, features),
        {"eager": lambda: eager(dtype)},
        oracle,
        channels * size * size * features.element_size(),
    )


@case(
    "gaussian_bilateral_upsample",
    "224 channels, 64^2 -> 1024^2",
    memory_target=(3.0, "result"),  # the result and less than two gigabytes
)
def large(device, dtype):
    n, size, channels = side(64), side(1024), classes(224)
    features = randn(device, dtype, 1, channels, n, n, memory_format=CL)
    guidance, maps = guidance_of(device, dtype, (size, size)), cell_maps(device, n)

    def shifted() -> Tensor:
        """Offset after offset, as people write it where memory is short."""
        return murf_fast.gaussian_bilateral_upsample(features, guidance, *maps, backend="reference")

    def oracle():
        where = (slice(None), slice(None, None, max(1, channels // 2)))
        exact = [features[where].double(), guidance.double(), *(m.double() for m in maps)]
        yield where, murf_fast.gaussian_bilateral_upsample(*exact, backend="reference")

    return Contenders(
        lambda: murf_fast.gaussian_bilateral_upsample(features, guidance, *maps),
        {"eager shifted": shifted},
        oracle,
        channels * size * size * features.element_size(),
    )


@smallest("gaussian_bilateral_upsample")
def tiny(device: str) -> None:
    shapes = [(1, 19, 2, 3), (1, 3, 7, 9), *[(1, 1, 2, 3)] * 4]
    leaves = [torch.rand(shape, device=device).add_(0.5).requires_grad_() for shape in shapes]
    murf_fast.gaussian_bilateral_upsample(*leaves, radius=1).square().sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves)


@configurations("gaussian_bilateral_upsample")
def shapes(device: str, dtype: torch.dtype) -> None:
    """An image's channels, a class map's and a backbone's; windows of one size and of many; a layout each."""
    for channels, reach, layout in ((3, 2.0, torch.contiguous_format), (19, None, CL), (384, 2.0, CL)):
        features = torch.zeros(1, channels, 3, 4, device=device, dtype=dtype).contiguous(memory_format=layout)
        guidance = torch.zeros(1, 3, 23, 30, device=device, dtype=dtype, requires_grad=True)
        maps = [torch.ones(1, 1, 3, 4, device=device, requires_grad=True) for _ in range(4)]
        backward(murf_fast.gaussian_bilateral_upsample(features.requires_grad_(), guidance, *maps, reach=reach))
        detached = [features.detach(), guidance.detach()]  # the optimization's
        backward(murf_fast.gaussian_bilateral_upsample(*detached, *maps, reach=reach))
