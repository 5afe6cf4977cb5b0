"""``resize``: size or scale factor, every mode, an intermediate grid, its adjoint."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fuzz.compare import Comparison, arithmetic, derived, unit
from fuzz.draw import Draw
from fuzz.maps import cotangent, drawn_map
from fuzz.resampling import ANTIALIASED, MODES, Resize, resize_of

__all__ = ["resize"]

FORMATS = (None, torch.channels_last, torch.contiguous_format)


def drawn_size(d: Draw, name: str, grid: tuple[int, int], most: int = 33) -> tuple[tuple[int, int], object]:
    """A (height, width), and how it is written. Often as in ViTs: the same, doubled, or one axis kept."""
    kind = d.choice(f"{name}.kind", ("any", "same", "double", "rows kept", "columns kept"), (6, 1, 1, 1, 1))
    size = d.grid(name, most)
    if kind in ("same", "double"):
        size = tuple(n if kind == "same" else 2 * n for n in grid)
    elif kind != "any":
        size = (grid[0], size[1]) if kind == "rows kept" else (size[0], grid[1])
    d.note(name, size)
    return size, written(d, name, size)


def written(d: Draw, name: str, size: tuple[int, int]) -> object:
    """The same size as people and other libraries write it."""
    form = d.choice(f"{name}.form", ("tuple", "list", "torch.Size", "one", "numpy"), (4, 2, 1, 2, 1))
    if form == "one" and size[0] == size[1]:
        return size[0]
    if form == "numpy":
        return tuple(np.int64(n) for n in size)
    return {"list": list, "torch.Size": torch.Size}.get(form, tuple)(size)


def drawn_rule(d: Draw) -> tuple[str, bool]:
    mode = d.choice("mode", MODES, (4, 3, 1, 1, 1))
    return mode, d.chance("antialias", 0.4) if mode in ANTIALIASED else False


def linear_bound(resize: Resize, x: Tensor, dtype: torch.dtype, more: int = 0) -> Tensor:
    """Roundings of the arithmetic of a resize of ``x``, element by element."""
    x = x.double()
    roundings, magnitude = resize.roundings + more, resize.magnitude(x)
    if dtype == torch.float64:
        # The right value is of that precision itself, and positions are rounded relative to the size of the map.
        roundings = 2 * roundings + 4 * max(max(m.shape) for step in resize.steps for m in step)
        magnitude = magnitude + (x.abs().max() if x.numel() else 0.0)
    if not roundings:
        return torch.zeros_like(magnitude)
    return roundings * unit(dtype) * magnitude + weight_noise(resize, x) + (roundings + 2) * smallest(dtype)


def weight_noise(resize: Resize, x: Tensor) -> float:
    """What float64 positions, relative to the size of a map, leave of weights that are zero on paper."""
    side = max(max(m.shape) for step in resize.steps for m in step)
    return 16 * side * unit(torch.float64) * float(x.abs().max()) if x.numel() else 0.0


def smallest(dtype: torch.dtype) -> float:
    """The smallest subnormal: what a product loses at the end of the range."""
    return torch.finfo(dtype).tiny * 2 * unit(dtype)


def check_layout(result: Tensor, like: Tensor, memory_format: torch.memory_format | None) -> None:
    """The documented layout, by strides; one channel lies in both, and one pixel in any."""
    if memory_format is None:
        if like.shape[2] * like.shape[3] == 1:
            return
        last = like.shape[1] > 1 and like.stride(1) == 1 and not like.is_contiguous()
        memory_format = torch.channels_last if last else torch.contiguous_format
    assert result.is_contiguous(memory_format=memory_format), f"strides {result.stride()}, wanted {memory_format}"


def resize(d: Draw) -> list[Comparison]:
    dtype = d.dtype()
    grid = d.grid("grid", 33)
    x = drawn_map(d, "x", (d.batch(), d.side("channels", 17), *grid), dtype, wants_grad=d.chance("gradient", 0.35))
    mode, antialias = drawn_rule(d)
    layout = d.choice("memory_format", FORMATS, (3, 1, 1))
    if d.chance("scaled", 0.4):
        factors = tuple(_factor(d, f"factor{axis}", n) for axis, n in enumerate(grid))
        if d.chance("one factor", 0.5) and int(grid[1] * factors[0]) >= 1:
            factors = (factors[0], factors[0])
        d.note("scale_factor", factors)
        given = factors[0] if factors[0] == factors[1] else factors
        if d.chance("numpy factor", 0.1):
            given = np.float64(factors[0]) if factors[0] == factors[1] else [np.float64(f) for f in factors]
        rule, arguments = resize_of(grid, None, mode, antialias, None, factors, dtype), {"scale_factor": given}
        assert rule.size == tuple(math.floor(n * f) for n, f in zip(grid, factors, strict=True))
    else:
        size, given = drawn_size(d, "size", grid)
        via, arguments = None, {"size": given}
        if d.chance("via", 0.25):
            via, arguments["via"] = drawn_size(d, "via", grid)
        rule = resize_of(grid, size, mode, antialias, via, None, dtype)
    result = d.call("resize", x, mode=mode, antialias=antialias, memory_format=layout, **arguments)
    check_layout(result, x, layout)
    wide = arithmetic(dtype)
    checks = [derived("result", result, rule(x.double()), linear_bound(rule, x.detach(), wide), dtype)]
    if x.requires_grad:
        g = cotangent(d, result)
        result.backward(g)
        adjoint = rule.transposed()
        checks.append(derived("gradient", x.grad, adjoint(g.double()), linear_bound(adjoint, g, wide), dtype))
    return checks


def _factor(d: Draw, name: str, n: int) -> float:
    kind = d.choice(f"{name}.kind", ("any", "kept", "near two", "ratio"))
    if kind == "kept":
        return d.number(name, 1.0, 1.0 + 0.9 / n)
    if kind == "near two":
        return d.choice(name, (2.0, 2.001, 2.0 + 0.5 / n))
    if kind == "ratio":
        return d.integer(name, 1, 2 * n) / n
    factor = d.number(name, 0.3, 3.0)
    return factor if int(n * factor) >= 1 else 1.0 / n + 1.0
