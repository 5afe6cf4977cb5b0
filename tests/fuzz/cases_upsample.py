"""``upsample_concat``, ``upsample_sum`` and ``upsample_mean``: linear in the maps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fuzz.cases_resize import FORMATS, check_layout, drawn_rule, drawn_size, linear_bound, smallest, weight_noise
from fuzz.compare import Comparison, arithmetic, derived, unit
from fuzz.draw import Draw
from fuzz.maps import VALUES, cotangent, drawn_map, drawn_vector
from fuzz.resampling import Resize, resize_of

__all__ = ["upsample_concat", "upsample_mean", "upsample_sum"]


@dataclass
class Maps:
    """Maps of one batch, and the resizes that bring them to one grid."""

    maps: list[Tensor]
    resizes: list[Resize]
    size: tuple[int, int]
    written_size: object
    options: dict
    dtype: torch.dtype

    @property
    def needs_grad(self) -> bool:
        return any(m.requires_grad for m in self.maps)

    def total(self, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum of all resized maps and a bias, and the roundings of its arithmetic."""
        wide = arithmetic(self.dtype)
        # All taps of all maps are added to one running sum: a map's terms also carry the roundings of the others'.
        additions = sum(r.roundings for r in self.resizes) + len(self.maps) - 1 + (bias is not None)
        shape = (*self.maps[0].shape[:2], *self.size)
        total, bound = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        for m, rule in zip(self.maps, self.resizes, strict=True):
            total = total + rule(m.detach().double())
            bound = bound + linear_bound(rule, m.detach(), wide, additions - rule.roundings)
        if bias is not None:
            row = bias.detach().double().reshape(-1, bias.shape[-1])[..., None, None]
            total = total + row
            # The bias itself is rounded to the dtype of the arithmetic.
            bound = bound + (additions + 1) * unit(wide) * row.abs()
        return total, bound


def drawn_maps(
    d: Draw, *, channels: int | None, gradients: bool, most: int = 33, kinds=VALUES, dtypes=None, via: bool = True
) -> Maps:
    """Up to four maps with a common number of channels, or each with its own (``channels`` None)."""
    dtype = d.dtype() if dtypes is None else d.dtype(options=dtypes)
    batch = d.batch()
    count = d.choice("maps", (1, 2, 3, 4), (5, 3, 2, 1))
    mode, antialias = drawn_rule(d)
    grids = []
    for s in range(count):
        again = s > 0 and d.chance(f"grid{s}.again", 0.3)
        grids.append(grids[-1] if again else d.grid(f"grid{s}", min(most, 17)))
    size, written = drawn_size(d, "size", grids[0], most)
    options = {"mode": mode, "antialias": antialias}
    between = None
    if via and d.chance("via", 0.2):
        between, options["via"] = drawn_size(d, "via", grids[0], 17)
    maps = [
        drawn_map(
            d,
            f"map{s}",
            (batch, channels or d.side(f"channels{s}", 17), *grid),
            dtype,
            kinds,
            wants_grad=gradients and d.chance(f"map{s}.gradient", 0.8),
        )
        for s, grid in enumerate(grids)
    ]
    resizes = [resize_of(grid, size, mode, antialias, between, None, dtype) for grid in grids]
    return Maps(maps, resizes, size, written, options, dtype)


def drawn_bias(d: Draw, maps: Maps, channels: int, kinds=("normal", "large", "small")) -> Tensor | None:
    shape = d.choice("bias", ("none", "row", "rows"), (2, 2, 1))
    if shape == "none":
        return None
    return drawn_vector(d, "bias", (channels,) if shape == "row" else (len(maps.maps[0]), channels), kinds=kinds)


def drawn_out(d: Draw, maps: Maps, channels: int) -> Tensor | None:
    """A tensor to write into."""
    if not d.chance("out", 0.25):
        return None
    layout = d.choice("out.layout", (torch.contiguous_format, torch.channels_last))
    shape = (len(maps.maps[0]), channels, *maps.size)
    return torch.full(shape, torch.nan, dtype=maps.dtype).contiguous(memory_format=layout)


def call(d: Draw, op: str, maps: Maps, channels: int, *args, needs_grad: bool | None = None, **options) -> Tensor:
    """The operation with a drawn layout or, where no gradients are needed, ``out=``, which is checked."""
    needs_grad = maps.needs_grad if needs_grad is None else needs_grad
    out = None if needs_grad else drawn_out(d, maps, channels)
    layout = d.choice("memory_format", FORMATS, (3, 1, 1)) if out is None else None
    version = None if out is None else out._version
    result = d.call(op, maps.maps, maps.written_size, *args, memory_format=layout, out=out, **maps.options, **options)
    if out is None:
        check_layout(result, maps.maps[0], layout)
    else:
        assert d.change or result is out, "the result is not `out`"
        assert not out.numel() or out._version > version, f"`out` was written and its version is {out._version} still"
    return result


def gradients(maps: Maps, g: Tensor) -> list[Comparison]:
    """Gradients of a sum of the resized maps: the transposed resizes."""
    wide, checks = arithmetic(maps.dtype), []
    for s, (m, rule) in enumerate(zip(maps.maps, maps.resizes, strict=True)):
        if m.requires_grad:
            adjoint = rule.transposed()
            want, bound = adjoint(g.double()), linear_bound(adjoint, g, wide)
            checks.append(derived(f"gradient of map {s}", m.grad, want, bound, maps.dtype))
    return checks


def upsample_concat(d: Draw) -> list[Comparison]:
    maps = drawn_maps(d, channels=None, gradients=d.chance("gradients", 0.35))
    result = call(d, "upsample_concat", maps, sum(m.shape[1] for m in maps.maps))
    checks, begin, wide = [], 0, arithmetic(maps.dtype)
    g = cotangent(d, result) if maps.needs_grad else None
    if g is not None:
        result.backward(g)
    for s, (m, rule) in enumerate(zip(maps.maps, maps.resizes, strict=True)):
        part = slice(begin, begin + m.shape[1])
        begin += m.shape[1]
        want, bound = rule(m.detach().double()), linear_bound(rule, m.detach(), wide)
        checks.append(derived(f"map {s}", result[:, part], want, bound, maps.dtype))
        if m.requires_grad:
            adjoint = rule.transposed()
            want, bound = adjoint(g[:, part].double()), linear_bound(adjoint, g[:, part], wide)
            checks.append(derived(f"gradient of map {s}", m.grad, want, bound, maps.dtype))
    assert begin == result.shape[1], f"{result.shape[1]} channels, right {begin}"
    return checks


def upsample_sum(d: Draw) -> list[Comparison]:
    wants = d.chance("gradients", 0.35)
    channels = d.side("channels", 17)
    maps = drawn_maps(d, channels=channels, gradients=wants)
    bias = drawn_bias(d, maps, channels)
    if bias is not None and maps.needs_grad and d.chance("bias.gradient", 0.7):
        bias = bias.detach().requires_grad_()
    result = call(d, "upsample_sum", maps, channels, bias=bias)
    checks = [derived("result", result, *maps.total(bias), maps.dtype)]
    if maps.needs_grad:
        g = cotangent(d, result)
        result.backward(g)
        checks += gradients(maps, g)
        if bias is not None and bias.requires_grad:
            over = (0, 2, 3) if bias.ndim == 1 else (2, 3)
            want, size = g.double().sum(over), g.double().abs().sum(over)
            terms = g.numel() / max(1, want.numel())
            checks.append(
                derived("gradient of bias", bias.grad, want, terms * unit(arithmetic(maps.dtype)) * size, bias.dtype)
            )
    return checks


def upsample_mean(d: Draw) -> list[Comparison]:
    wants = d.chance("gradients", 0.3)
    channels = d.side("channels", 5)
    maps = drawn_maps(d, channels=channels, gradients=wants)
    count = len(maps.maps)
    kind = d.choice("weights", ("none", "numbers", "numpy", "tensor"), (2, 3, 1, 3))
    weights = None
    if kind in ("numbers", "numpy"):
        weights = [d.number(f"weight{s}", 0.1, 3.0) for s in range(count)]
        if d.chance("negative weight", 0.3):
            weights[0] = -sum(weights[1:]) / 2 if count > 1 else weights[0]
        d.note("weights", weights)
        if kind == "numpy":
            weights = [np.float64(w) for w in weights]
    elif kind == "tensor":
        weights = drawn_vector(d, "weights", (count,)).abs() + 0.25
        if wants and d.chance("weights.gradient", 0.5):
            weights = weights.detach().requires_grad_()
        elif d.chance("negative weight", 0.3) and count > 1:
            weights = torch.cat([-weights[1:].sum(0, keepdim=True) / 2, weights[1:]])
    tensors = [*maps.maps, *([weights] if isinstance(weights, Tensor) else [])]
    result = call(d, "upsample_mean", maps, channels, weights, needs_grad=any(x.requires_grad for x in tensors))
    given = [1.0] * count if weights is None else [float(w) for w in weights]
    total, size = sum(given), sum(abs(w) for w in given)
    wide = arithmetic(maps.dtype)
    # A weight's division, product and the sum of all; their sum is as exact as its terms cancel.
    more = 3 + 2 * count + (count + 1) * size / abs(total)
    additions = sum(r.roundings for r in maps.resizes)
    want = torch.zeros((*maps.maps[0].shape[:2], *maps.size), dtype=torch.float64)
    bound = torch.zeros_like(want)
    for w, m, rule in zip(given, maps.maps, maps.resizes, strict=True):
        want = want + w / total * rule(m.detach().double())
        roundings = (additions + more) * unit(wide)
        bound = bound + roundings * abs(w / total) * rule.magnitude(m.detach().double())
        bound = bound + abs(w / total) * weight_noise(rule, m.detach().double()) + 4 * smallest(wide)
    checks = [derived("result", result, want, bound, maps.dtype)]
    if result.requires_grad:
        g = cotangent(d, result)
        result.backward(g)
        for s, (m, rule) in enumerate(zip(maps.maps, maps.resizes, strict=True)):
            if m.requires_grad:
                adjoint, share = rule.transposed(), given[s] / total
                bound = (adjoint.roundings + more) * unit(wide) * abs(share) * adjoint.magnitude(g.double())
                bound = bound + abs(share) * weight_noise(rule, g.double()) + 4 * smallest(wide)
                want = share * adjoint(g.double())
                checks.append(derived(f"gradient of map {s}", m.grad, want, bound, maps.dtype))
        if isinstance(weights, Tensor) and weights.requires_grad:
            checks.append(_gradient_of_weights(maps, weights, g, wide))
    return checks


def _gradient_of_weights(maps: Maps, weights: Tensor, g: Tensor, wide: torch.dtype) -> Comparison:
    """``(<g, U_s m_s> - <g, mean>) / sum of weights``."""
    total = weights.detach().double().sum()
    products, sizes, roundings = [], [], 0
    for m, rule in zip(maps.maps, maps.resizes, strict=True):
        products.append((g.double() * rule(m.detach().double())).sum())
        sizes.append((g.double().abs() * rule.magnitude(m.detach().double())).sum())
        roundings = max(roundings, rule.roundings, rule.transposed().roundings)
    products, sizes = torch.stack(products), torch.stack(sizes)
    share = weights.detach().double() / total
    want = (products - (share * products).sum()) / total
    # Averages of one grid's maps are rounded to the maps' dtype once where a gradient is needed.
    terms = (roundings + g.numel() + maps.maps[0].numel() + 8 * len(maps.maps)) * unit(wide) + unit(maps.dtype)
    bound = terms * (sizes + (share * sizes).sum()) / total
    return derived("gradient of weights", weights.grad, want, bound, weights.dtype)
