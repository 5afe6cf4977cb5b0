"""AnyUp's encoders where gradients are needed: what a backward can compute again is not kept.

Plain PyTorch keeps six maps of a residual block: each norm's argument and result, and what SiLU makes of it. Here a
block keeps its argument. Its backward makes the map between its two halves again and goes over the pixels in bands that
stay in cache: once for a norm's sums, which are over the whole image, and once to apply them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from murf_fast.ops._derivatives import derivatives_wanted, in_transform
from murf_fast.reference import anyup as plain

_GROUPS, _EPS = 8, 1e-5
_PARAMETERS = ("0.weight", "0.bias", "2.weight", "3.weight", "3.bias", "5.weight")
# Rows of 128 float32: half a MiB, of which the backward has four. A GPU has no use for bands but less memory.
_BAND, _GPU_BAND = 1024, 2**18


def encoder(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """As :func:`murf_fast.reference.anyup.encoder`; channels_last where gradients are kept for."""
    blocks = [[weights[f"{name}.{block}.block.{p}"] for p in _PARAMETERS] for block in (1, 2)]
    kernel = weights[f"{name}.0.weight"]
    if not _by_backward(x, kernel, *blocks[0], *blocks[1]):
        return plain.encoder(weights, name, x)
    if kernel.shape[-1] > 1:
        x = F.conv2d(F.pad(x, [kernel.shape[-1] // 2] * 4, mode="reflect"), kernel)
    else:
        x = F.linear(x.permute(0, 2, 3, 1), kernel.flatten(1)).permute(0, 3, 1, 2)
    for parameters in blocks:
        x = _Block.apply(x, *parameters)
    return x


def mixed_with_positions(x: Tensor, frequencies: Tensor) -> Tensor:
    """As :func:`murf_fast.reference.anyup.mixed_with_positions`, whose half a dozen maps are made again."""
    if not _by_backward(x, frequencies):
        return plain.mixed_with_positions(x, frequencies)
    return _Mixed.apply(x, frequencies)


def _by_backward(*tensors: Tensor) -> bool:
    """Whether derivatives are taken, and by a backward; a compiler makes its own plans."""
    if torch.compiler.is_compiling() or in_transform() or forward_ad._current_level >= 0:
        return False
    return derivatives_wanted(tensors)


class _Half(NamedTuple):
    """Parameters of one half of a block: norm, SiLU, 1x1 convolution."""

    scale: Tensor
    shift: Tensor
    weight: Tensor


class _Statistics(NamedTuple):
    """(B, C): ``x * reciprocal - centre`` has mean 0 and deviation 1 in each group of channels."""

    reciprocal: Tensor
    centre: Tensor


class _Block(torch.autograd.Function):
    """A residual block: ``x + W2 silu(norm2(W1 silu(norm1(x))))``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        first, second = _halves(parameters)
        rows = _rows(x)
        of_rows = _statistics(rows)
        between = _convolved(rows, of_rows, first)
        of_between = _statistics(between)
        ctx.save_for_backward(x, *parameters)
        ctx.statistics = of_rows, of_between
        return _map(_convolved(between, of_between, second, rows), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad
        with torch.autocast(grad.device.type, enabled=False):
            if torch.is_grad_enabled():
                return _differentiable(_plain_block, tensors, needed, grad)
            x, *parameters = tensors
            first, second = _halves(parameters)
            rows, grad_rows = _rows(x), _rows(grad)
            of_rows, of_between = ctx.statistics
            between = _convolved(rows, of_rows, first)
            d_between, *of_second = _gradients(between, of_between, second, grad_rows, needed[6])
            del between
            dx, *of_first = _gradients(rows, of_rows, first, d_between, needed[3], grad_rows)
            grads = (_map(dx, x), *of_first, *of_second)
            return tuple(g.to(t.dtype) if n else None for g, t, n in zip(grads, tensors, needed, strict=True))


class _Mixed(torch.autograd.Function):
    """``x cos(a) + turned(x) sin(a)`` with angles of positions, in bands of rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frequencies: Tensor) -> Tensor:
        ctx.save_for_backward(x, frequencies)
        pixels = x.permute(0, 2, 3, 1)
        result = torch.empty(pixels.shape, dtype=x.dtype, device=x.device)
        for band, _, cos, sin in _angles(pixels, frequencies):
            y = pixels[:, band]
            result[:, band] = _turned(y).mul_(sin).addcmul_(y, cos)
        return result.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, frequencies = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(plain.mixed_with_positions, ctx.saved_tensors, ctx.needs_input_grad, grad)
        pixels, grads = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
        of_x = torch.empty(pixels.shape, dtype=x.dtype, device=x.device)
        of_frequencies = torch.zeros(frequencies.shape, dtype=torch.float64, device=x.device)
        for band, (rows, columns), cos, sin in _angles(pixels, frequencies):
            y, g = pixels[:, band], grads[:, band]
            of_x[:, band] = (g * cos).sub_(_turned(g * sin))
            of_angle = _turned(y).mul_(cos).addcmul_(y, sin, value=-1).mul_(g).sum(0)
            of_frequencies[0] += (of_angle.sum(1) * rows).sum(0)
            of_frequencies[1] += (of_angle.sum(0) * columns).sum(0)
        wanted = zip(
            (of_x.permute(0, 3, 1, 2), of_frequencies.to(frequencies.dtype)), ctx.needs_input_grad, strict=True
        )
        return tuple(g if n else None for g, n in wanted)


def _angles(pixels: Tensor, frequencies: Tensor) -> Iterator[tuple[slice, tuple[Tensor, Tensor], Tensor, Tensor]]:
    """Bands of rows: which, their positions, and cosine and sine of their angles, (rows, W, C)."""
    height, width = pixels.shape[1:3]
    dtype = _precise(pixels)
    of_row, of_column = frequencies.to(dtype)
    rows, columns = (torch.linspace(0, 1, n, dtype=dtype, device=pixels.device)[:, None] for n in (height, width))
    step = max(1, (_BAND if pixels.is_cpu else _GPU_BAND) // width)
    for first in range(0, height, step):
        band = slice(first, first + step)
        angle = (rows[band] * of_row)[:, None] + columns * of_column
        yield band, (rows[band], columns), angle.cos(), angle.sin_()


def _turned(y: Tensor) -> Tensor:
    """(-second half, first half) of the channels, in float32 at least; its own inverse but for the sign."""
    first, second = y.to(_precise(y)).chunk(2, -1)
    return torch.cat([-second, first], -1)


def _differentiable(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients, by plain PyTorch, where their own gradients are wanted."""
    inputs = [t for t, n in zip(tensors, needed, strict=True) if n]
    found = iter(torch.autograd.grad(function(*tensors), inputs, grad, create_graph=True))
    return tuple(next(found) if n else None for n in needed)


def _halves(parameters: Sequence[Tensor]) -> tuple[_Half, _Half]:
    dtype = _precise(parameters[0])
    return tuple(_Half(g.to(dtype), b.to(dtype), w.flatten(1)) for g, b, w in (parameters[:3], parameters[3:]))


def _plain_block(x: Tensor, *parameters: Tensor) -> Tensor:
    y = x
    for scale, shift, weight in (parameters[:3], parameters[3:]):
        y = F.conv2d(F.silu(F.group_norm(y, _GROUPS, scale, shift, _EPS)), weight)
    return x + y


def _rows(x: Tensor) -> Tensor:
    """(B, pixels, C), contiguous."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def _map(rows: Tensor, like: Tensor) -> Tensor:
    return rows.unflatten(1, tuple(like.shape[2:])).permute(0, 3, 1, 2)


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _bands(rows: Tensor) -> Iterator[tuple[int, slice]]:
    """Images, and pixels of each."""
    step = _BAND if rows.is_cpu else _GPU_BAND
    for i in range(rows.shape[0]):
        for first in range(0, rows.shape[1], step):
            yield i, slice(first, first + step)


def _by_group(x: Tensor) -> Tensor:
    """Means of (B, C) over each group's channels, for every channel."""
    means = x.unflatten(1, (_GROUPS, -1)).mean(2, keepdim=True)
    return means.expand(-1, -1, x.shape[1] // _GROUPS).flatten(1)


def _statistics(rows: Tensor) -> _Statistics:
    """From every band's own mean and squares about it."""
    dtype, wide = _precise(rows), torch.float64
    batch, pixels, _ = rows.shape
    means, squares, count = [], [], []
    for i, band in _bands(rows):
        x = rows[i, band].to(dtype)
        means.append(x.mean(0))
        squares.append((x - means[-1]).square_().sum(0))
        count.append(len(x))
    means, squares = (torch.stack(v).to(wide).unflatten(0, (batch, -1)) for v in (means, squares))
    share = torch.tensor(count, dtype=wide, device=rows.device).unflatten(0, (batch, -1, 1)) / pixels
    mean = _by_group((share * means).sum(1))
    variance = _by_group((squares / pixels + share * (means - mean[:, None]).square()).sum(1))
    reciprocal = (variance + _EPS).rsqrt()
    return _Statistics(reciprocal.to(dtype), (mean * reciprocal).to(dtype))


def _convolved(rows: Tensor, of: _Statistics, half: _Half, residual: Tensor | None = None) -> Tensor:
    result = torch.empty((*rows.shape[:2], len(half.weight)), dtype=rows.dtype, device=rows.device)
    factors, offsets = of.reciprocal * half.scale, half.shift - of.centre * half.scale
    for i, band in _bands(rows):
        z = F.silu(torch.addcmul(offsets[i], rows[i, band], factors[i]), inplace=True).to(rows.dtype)
        if residual is None:
            torch.mm(z, half.weight.mT, out=result[i, band])
        else:
            torch.addmm(residual[i, band], z, half.weight.mT, out=result[i, band])
    return result


def _gradients(
    rows: Tensor, of: _Statistics, half: _Half, grad: Tensor, weight_wanted: bool, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the rows, in float32 at least, and of norm and weight."""
    dtype = _precise(rows)
    result = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    of_weight = torch.zeros(half.weight.shape, dtype=dtype, device=rows.device)
    sums, products = torch.zeros((2, *of.centre.shape), dtype=torch.float64, device=rows.device)
    for i, band in _bands(rows):
        normal = torch.addcmul(-of.centre[i], rows[i, band], of.reciprocal[i])
        z = torch.addcmul(half.shift, normal, half.scale)
        g = grad[i, band].to(rows.dtype)
        if weight_wanted:
            of_weight += g.mT @ F.silu(z).to(rows.dtype)
        dz = result[i, band]
        torch.ops.aten.silu_backward.grad_input((g @ half.weight).to(dtype), z, grad_input=dz)
        sums[i] += dz.sum(0)
        products[i] += normal.mul_(dz).sum(0)
    # dx = reciprocal (scale dz - mean(scale dz) - normal mean(scale dz normal)), means over a group's pixels.
    count = rows.shape[1]
    mean, along = (_by_group(s * half.scale / count).to(dtype) for s in (sums, products))
    factors, slopes = of.reciprocal * half.scale, -of.reciprocal.square() * along
    offsets = of.reciprocal * (of.centre * along - mean)
    for i, band in _bands(rows):
        others = torch.addcmul(offsets[i], rows[i, band], slopes[i])
        if residual is not None:
            others += residual[i, band]
        torch.addcmul(others, result[i, band], factors[i], out=result[i, band])
    return result, products.sum(0), sums.sum(0), of_weight[:, :, None, None]
