"""The upsamplers of the tables: our modules, and the originals' order of operations on the same parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import murf_fast
from murf_fast import reference, windows
from murf_fast.nn import JAFAR, NAF, AnyUp, JBUStack
from murf_fast.nn.guided._anyup_forward import window_rule
from murf_fast.nn.guided.jbu_level import Drawn
from murf_fast.reference.anyup import anyup
from murf_fast.reference.jafar import jafar
from murf_fast.reference.naf import naf

Size = tuple[int, int]
PATCH = 16  # pixels of the image for a cell of the features


class Bilinear(nn.Module):
    """The floor: the result is written, and little else."""

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        return murf_fast.resize(features, tuple(image.shape[2:]))


class JBU(nn.Module):
    """:class:`JBUStack` with the arguments in the order of the others."""

    def __init__(self, stack: JBUStack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        return self.stack(features, image)


@dataclass(frozen=True)
class Upsampler:
    """How one is made, what its original computes, and which operations of that ours does without.

    Args:
        make: A module called with (image, features), random weights, of the features' channels and grid.
        plain: The original's order of operations, of the module's parameters.
        saved: Operations of ``plain`` that ours does not need, of one image.
        elementwise: Operations of ``plain`` that are no products to a counter, of one image.
        load: A module with weights from a file; None: it has none.
        least: Cells of a side of the features that it needs, where borders are reflected.
    """

    make: Callable[[int, Size], nn.Module]
    plain: Callable[[Any, Tensor, Tensor], Tensor]
    saved: Callable[[Any, int, Size, Size], float] = lambda module, channels, grid, size: 0.0
    elementwise: Callable[[Any, int, Size, Size], float] = lambda module, channels, grid, size: 0.0
    load: Callable[[str], nn.Module] | None = None
    least: int = 2


def plain_bilinear(module: nn.Module, image: Tensor, features: Tensor) -> Tensor:
    return F.interpolate(features, tuple(image.shape[2:]), mode="bilinear", align_corners=False)


def plain_jbu(module: JBU, image: Tensor, features: Tensor) -> Tensor:
    """Per level kernels of the unfolded guidance, the resized source, and a pass over it for every tap, as plain
    PyTorch is without FeatUp's extension; the last convolution at the output's size.
    """
    source = features
    if module.stack.norm is not None:
        source = module.stack.norm(source.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    for level in module.stack.levels:
        guidance = F.adaptive_avg_pool2d(image, (2 * source.shape[2], 2 * source.shape[3]))
        params = [p for p in Drawn.of(level, guidance).params if p is not None]
        kernels = reference.bilateral_kernels(guidance, params, level.radius)
        source = F.interpolate(source, guidance.shape[2:], mode=level.mode, align_corners=False)
        source = TapByTap.apply(F.pad(source, [level.radius] * 4, mode="reflect"), kernels)
    if module.stack.fixup_proj is None:
        return source
    return source + 0.1 * module.stack.fixup_proj(source)


class TapByTap(torch.autograd.Function):
    """An adaptive convolution (B, C, H, W) of a padded map with kernels (B, D * D, H, W), and its gradients, as one
    multiply-add of whole maps per tap: what FeatUp's extension computes, without what autograd would keep of it.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, kernels: Tensor) -> Tensor:
        ctx.save_for_backward(padded, kernels)
        result = torch.zeros_like(padded[:, :, : kernels.shape[2], : kernels.shape[3]])
        for tap, (y, x) in _offsets(kernels):
            result.addcmul_(padded[:, :, y : y + tap.shape[2], x : x + tap.shape[3]], tap)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        padded, kernels = ctx.saved_tensors
        of_padded, of_taps = torch.zeros_like(padded), []
        for tap, (y, x) in _offsets(kernels):
            where = (..., slice(y, y + tap.shape[2]), slice(x, x + tap.shape[3]))
            of_padded[where].addcmul_(gradient, tap)
            of_taps.append((gradient * padded[where]).sum(1, keepdim=True))
        return of_padded, torch.cat(of_taps, 1)


def _offsets(kernels: Tensor) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Every tap of the kernels (B, 1, H, W), and its row and column."""
    diameter = math.isqrt(kernels.shape[1])
    for t in range(diameter**2):
        yield kernels[:, t : t + 1], divmod(t, diameter)


def plain_anyup(module: AnyUp, image: Tensor, features: Tensor) -> Tensor:
    """Whole maps, a mask of all queries and keys, the weights of every head."""
    rule = window_rule(module.windows, module.window_ratio, image.shape[2:], features.shape[2:])
    weights = dict(module.named_parameters())
    return anyup(weights, image, features, rule, image.shape[2:], module.num_heads)


def plain_naf(module: NAF, image: Tensor, features: Tensor) -> Tensor:
    """As the original, but for NATTEN: all keys and a mask, as plain PyTorch has no neighborhood attention."""
    size, grid = tuple(image.shape[2:]), tuple(features.shape[2:])
    rule = windows.neighborhood(size, grid, module.kernel_size)
    weights = {**module.state_dict(keep_vars=True)}
    return naf(weights, image, features, rule, size, module.num_heads)


def plain_jafar(module: JAFAR, image: Tensor, features: Tensor) -> Tensor:
    """Whole maps, the weights of every head."""
    return jafar(dict(module.named_parameters()), image, features, image.shape[2:], module.num_heads)


def anyup_attention(module: AnyUp, channels: int, grid: Size, size: Size) -> float:
    """Operations of the original's attention and projections: all keys, and values that do not reach the result."""
    queries, keys, width = _area(size), _area(grid), module.qk_dim
    projections = queries * width**2 * 2 + keys * width**2 * 2  # of queries, keys and values, and of the output
    return 2.0 * (projections + queries * keys * (2 * width + channels))


def _saved_anyup(module: AnyUp, channels: int, grid: Size, size: Size) -> float:
    rule = window_rule(module.windows, module.window_ratio, size, grid)
    width = module.qk_dim
    ours = 2.0 * ((_area(size) + _area(grid)) * width**2 + pairs(rule, size, grid) * (width + channels))
    return anyup_attention(module, channels, grid, size) - ours


def _saved_naf(module: NAF, channels: int, grid: Size, size: Size) -> float:
    rule = windows.neighborhood(size, grid, module.kernel_size)
    return 2.0 * (_area(size) * _area(grid) - pairs(rule, size, grid)) * (module.dim + channels)


def _saved_jbu(module: JBU, channels: int, grid: Size, size: Size) -> float:
    """The last convolution runs at the resolution of the source."""
    return 0.0 if module.stack.fixup_proj is None else 2.0 * (_area(size) - _area(grid)) * channels**2


def _taps(module: JBU, channels: int, grid: Size, size: Size) -> float:
    """Multiply-adds of the kernels with the source, on all levels."""
    taps = [(2 * level.radius + 1) ** 2 for level in module.stack.levels]
    return sum(2.0 * count * channels * _area(grid) * 4 ** (i + 1) for i, count in enumerate(taps))


def pairs(rule: windows.Windows, size: Size, grid: Size) -> int:
    """Queries times the keys that each of them sees."""
    rows, columns = rule.tables(size, grid)
    return int(rows.count.sum()) * int(columns.count.sum())


def _area(size: Size) -> int:
    return size[0] * size[1]


def _jbu(**options: Any) -> Callable[[int, Size], nn.Module]:
    return lambda channels, grid: JBU(JBUStack(channels, **options))


def _load_jbu(file: str) -> nn.Module:
    return JBU(JBUStack.from_checkpoint(file))


UPSAMPLERS = {
    "bilinear": Upsampler(lambda channels, grid: Bilinear(), plain_bilinear),
    "jbu": Upsampler(_jbu(), plain_jbu, _saved_jbu, _taps, _load_jbu),
    # The first level's output is reflected at its borders, by five pixels.
    "jbu-shared": Upsampler(_jbu(shared=True), plain_jbu, _saved_jbu, _taps, _load_jbu, least=3),
    "jafar": Upsampler(lambda channels, grid: JAFAR(channels), plain_jafar, load=JAFAR.from_checkpoint),
    # A grid of fewer rows than NAF's window of nine is seen whole.
    "naf": Upsampler(
        lambda channels, grid: NAF(kernel_size=min(9, *grid)), plain_naf, _saved_naf, load=NAF.from_checkpoint
    ),
    "anyup": Upsampler(lambda channels, grid: AnyUp(), plain_anyup, _saved_anyup, load=AnyUp.from_checkpoint),
    "anyup-natten": Upsampler(
        lambda channels, grid: AnyUp(windows="natten"),
        plain_anyup,
        _saved_anyup,
        load=lambda file: AnyUp.from_checkpoint(file, windows="natten"),
    ),
}
NAMES = {
    "bilinear": "bilinear",
    "jbu": "FeatUp JBU",
    "jbu-shared": "SimFeatUp JBU",
    "jafar": "JAFAR",
    "naf": "NAF",
    "anyup": "AnyUp",
    "anyup-natten": "AnyUp, natten",
}


def frozen(function: Callable[[], object]) -> Callable[[], object]:
    return torch.no_grad()(function)
