"""AnyUp's encoders where gradients are needed: what a backward can compute again is not kept.

Plain PyTorch keeps six maps of a residual block: each norm's argument and result, and what SiLU makes of it. Here a
block keeps its argument, and the forward's layers are those of inference. The backward makes the map between a block's
halves again and goes over the pixels in bands that stay in cache: once for a norm's sums, which are over the whole
image, and once to apply them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from murf_fast import backends
from murf_fast.ops._derivatives import derivatives_wanted, differentiable_gradients, in_transform
from murf_fast.ops._pixel_linear import pixel_linear
from murf_fast.ops._pixels import arithmetic_of
from murf_fast.reference import anyup as plain

_GROUPS, _EPS = 8, 1e-5
_PARAMETERS = ("0.weight", "0.bias", "2.weight", "3.weight", "3.bias", "5.weight")
# Rows of 128 float32: a MiB. Of 512 to 4096 as fast as any on one thread of a machine with 2 MiB of L2, and the fastest
# on two, which meet after every band. A GPU has no use for bands but less memory.
_BAND, _GPU_BAND = 2048, 2**18


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
    return _Blocks.apply(x, *blocks[0], *blocks[1])


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


class _Blocks(torch.autograd.Function):
    """Residual blocks: ``x + W2 silu(norm2(W1 silu(norm1(x))))``, one after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        rows = _rows(x)
        of_rows, kept, ctx.statistics = _statistics(rows), [], []
        for first, second in _blocks(parameters):
            between, of_between = _layer(rows, of_rows, first)
            kept.append(rows)
            ctx.statistics.append((of_rows, of_between))
            rows, of_rows = _layer(between, of_between, second, rows)
        ctx.save_for_backward(x, *parameters, *kept[1:])
        return _map(rows, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        x, *parameters = tensors = ctx.saved_tensors[: len(needed)]
        with torch.autocast(grad.device.type, enabled=False):
            if torch.is_grad_enabled():
                return differentiable_gradients(_plain_blocks, tensors, needed, grad)
            kept, grad_rows = [_rows(x), *ctx.saved_tensors[len(needed) :]], _rows(grad)
            found: list[Any] = []
            for i, (first, second) in reversed(list(enumerate(_blocks(parameters)))):
                rows, (of_rows, of_between) = kept[i], ctx.statistics[i]
                between, _ = _layer(rows, of_rows, first)
                # Two maps do for all: the gradient of the one between takes its place.
                dz = torch.empty(rows.shape, dtype=_precise(rows), device=rows.device)
                wanted = needed[1 + 6 * i :]
                of_second = _gradients(between, of_between, second, grad_rows, wanted[5], dz, between)
                of_first = _gradients(rows, of_rows, first, between, wanted[2], dz, dz, grad_rows)
                found, grad_rows = [*of_first, *of_second, *found], dz
            grads = zip((_map(grad_rows, x), *found), tensors, needed, strict=True)
            return tuple(g.to(t.dtype) if n else None for g, t, n in grads)


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
            return differentiable_gradients(plain.mixed_with_positions, ctx.saved_tensors, ctx.needs_input_grad, grad)
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


def _blocks(parameters: Sequence[Tensor]) -> list[tuple[_Half, _Half]]:
    dtype = _precise(parameters[0])
    halves = [
        _Half(scale.to(dtype), shift.to(dtype), weight.flatten(1))
        for scale, shift, weight in zip(parameters[::3], parameters[1::3], parameters[2::3], strict=True)
    ]
    return list(zip(halves[::2], halves[1::2], strict=True))


def _plain_blocks(x: Tensor, *parameters: Tensor) -> Tensor:
    names = [f"x.{block}.block.{p}" for block in (1, 2) for p in _PARAMETERS]
    return plain.residual_blocks(dict(zip(names, parameters, strict=True)), "x", x)


def _rows(x: Tensor) -> Tensor:
    """(B, pixels, C), contiguous."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def _map(rows: Tensor, like: Tensor) -> Tensor:
    return rows.unflatten(1, tuple(like.shape[2:])).permute(0, 3, 1, 2)


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _bands(*rows: Tensor) -> Iterator[tuple[Any, ...]]:
    """Image by image, and band by band of its pixels: which image, and each argument's (pixels, C)."""
    step = _BAND if rows[0].is_cpu else _GPU_BAND
    for i, images in enumerate(zip(*rows, strict=True)):
        for bands in zip(*(x.split(step) for x in images), strict=True):
            yield i, *bands


def _of_images(sums: list[Tensor], rows: Tensor) -> Tensor:
    """(B, bands, C) in float64, of what was found band by band."""
    return torch.stack(sums).double().unflatten(0, (len(rows), -1))


def _by_group(x: Tensor) -> Tensor:
    """Means of (B, C) over each group's channels, for every channel."""
    means = x.unflatten(1, (_GROUPS, -1)).mean(2, keepdim=True)
    return means.expand(-1, -1, x.shape[1] // _GROUPS).flatten(1)


def _statistics(rows: Tensor) -> _Statistics:
    """From every band's own mean and squares about it."""
    count, means, squares = [], [], []
    for _, x in _bands(rows):
        x = x.to(_precise(rows))
        means.append(x.mean(0))
        squares.append((x - means[-1]).square_().sum(0))
        count.append(len(x))
    means, squares = _of_images(means, rows), _of_images(squares, rows)
    share = torch.tensor(count, dtype=means.dtype, device=rows.device).view(len(rows), -1, 1) / rows.shape[1]
    mean = (share * means).sum(1)
    between = rows.shape[1] * share * (means - mean[:, None]).square()
    return _grouped(mean, (squares + between).sum(1), rows)


def _grouped(mean: Tensor, squares: Tensor, rows: Tensor) -> _Statistics:
    """From (B, C) means, and sums of squares about them, of every channel."""
    of_group = _by_group(mean)
    variance = _by_group(squares / rows.shape[1] + (mean - of_group).square())
    reciprocal = (variance + _EPS).rsqrt()
    return _Statistics(reciprocal.to(_precise(rows)), (of_group * reciprocal).to(_precise(rows)))


def _layer(rows: Tensor, of: _Statistics, half: _Half, residual: Tensor | None = None) -> tuple[Tensor, _Statistics]:
    """One half of a block, and what the next norm needs."""
    backend = backends.resolve(None, rows.device.type, rows.dtype)
    dtype = arithmetic_of(backend, rows.dtype)
    gains, offsets = of.reciprocal * half.scale, half.shift - of.centre * half.scale
    weight = half.weight.mT.to(dtype).contiguous()
    result, found = torch.empty((*rows.shape[:2], weight.shape[1]), dtype=rows.dtype, device=rows.device), []
    for i, x in enumerate(rows):
        out = result[i].to(dtype)
        added = None if residual is None else residual[i].to(dtype)
        norm = gains[i], offsets[i]
        found.append(
            pixel_linear(x.to(dtype), out, norm=norm, weight=weight, residual=added, statistics=True, backend=backend)
        )
        if out.dtype != result.dtype:
            result[i] = out
    mean, squares = (torch.stack(v) for v in zip(*found, strict=True))
    return result, _grouped(mean, squares, rows)


def _gradients(
    rows: Tensor,
    of: _Statistics,
    half: _Half,
    grad: Tensor,
    weight_wanted: bool,
    dz: Tensor,
    out: Tensor,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of norm and weight. That of the rows, plus ``residual``, goes into ``out``, which may be ``rows`` or ``dz``, room
    for a map.
    """
    of_weight = torch.zeros(half.weight.shape, dtype=dz.dtype, device=rows.device)
    sums, products = [], []
    for i, x, g, d in _bands(rows, grad, dz):
        normal = torch.addcmul(-of.centre[i], x, of.reciprocal[i])
        z = torch.addcmul(half.shift, normal, half.scale)
        g = g.to(rows.dtype)
        if weight_wanted:
            of_weight += g.mT @ F.silu(z).to(rows.dtype)
        torch.ops.aten.silu_backward.grad_input((g @ half.weight).to(dz.dtype), z, grad_input=d)
        sums.append(d.sum(0))
        products.append(normal.mul_(d).sum(0))
    sums, products = (_of_images(v, rows).sum(1) for v in (sums, products))
    # dx = reciprocal (scale dz - mean(scale dz) - normal mean(scale dz normal)), means over a group's pixels.
    mean, along = (_by_group(v * half.scale / rows.shape[1]).to(dz.dtype) for v in (sums, products))
    factors, slopes = of.reciprocal * half.scale, -of.reciprocal.square() * along
    offsets = of.reciprocal * (of.centre * along - mean)
    for i, x, d, dx, *added in _bands(rows, dz, out, *([] if residual is None else [residual])):
        others = torch.addcmul(offsets[i], x, slopes[i])
        if added:
            others += added[0]
        torch.addcmul(others, d, factors[i], out=dx)
    return products.sum(0), sums.sum(0), of_weight[:, :, None, None]
