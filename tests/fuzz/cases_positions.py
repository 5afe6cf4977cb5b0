"""``resample_pos_embed`` and ``resample_patch_embed``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fuzz.cases_resize import drawn_rule, linear_bound, smallest, written
from fuzz.compare import Comparison, arithmetic, derived, exact, unit
from fuzz.draw import Draw
from fuzz.maps import laid_out, values
from fuzz.resampling import resize_of

__all__ = ["resample_patch_embed", "resample_pos_embed"]

# What each code base calls: mode, antialias, offset of the grid in its scale factor.
FLAVORS = {
    "dinov2-hub": ("bicubic", False, 0.1),
    "dinov2-hf": ("bicubic", False, 0.0),
    "dinov2-reg": ("bicubic", True, 0.0),
    "siglip": ("bicubic", False, 0.0),
    "siglip2": ("bilinear", True, 0.0),
    "timm": ("bicubic", True, 0.0),
}


def table_at(table: Tensor, prefix: int, source: tuple, grid: tuple, flavor: str) -> tuple[Tensor, Tensor]:
    """(P + h w, D) in float64 and the roundings of its arithmetic, (P + h w, D); the table itself on its own square."""
    mode, antialias, offset = FLAVORS[flavor]
    wide, rows = table.double(), arithmetic(table.dtype)
    if grid == source and (source[0] == source[1] or not offset):
        return wide, torch.zeros_like(wide)
    factors = tuple((g + offset) / n for g, n in zip(grid, source, strict=True)) if offset else None
    rule = resize_of(source, None if factors else grid, mode, antialias, None, factors, table.dtype)
    assert rule.size == tuple(grid)
    map_ = wide[prefix:].T.unflatten(1, source)[None]
    bound = linear_bound(rule, map_.detach(), rows)[0].flatten(1).T
    return (
        torch.cat([wide[:prefix], rule(map_)[0].flatten(1).T]),
        torch.cat([torch.zeros(prefix, wide.shape[1], dtype=torch.float64), bound]),
    )


def resample_pos_embed(d: Draw) -> list[Comparison]:
    dtype = d.dtype()
    side = 5 if d.interpreted else 16
    source = (d.integer("source.h", 1, side), d.integer("source.w", 1, side))
    if d.chance("square", 0.5):
        source = (source[0], source[0])
    prefix = d.choice("num_prefix_tokens", (0, 1, 5))
    width = d.choice("width", (1, 3, 8, 17))
    flavor = d.choice("flavor", tuple(FLAVORS))
    table = values(d, "table", (prefix + source[0] * source[1], width), dtype)
    layout = d.choice("table.layout", ("contiguous", "transposed", "sliced", "negative"))
    if layout == "transposed":
        table = table.T.contiguous().T
    elif layout == "sliced":
        table = table.repeat_interleave(2, 1)[:, ::2]
    elif layout == "negative":
        table = torch._neg_view(-table)
    wants = d.chance("gradient", 0.3)
    table = table.detach().requires_grad_(wants)
    leading = d.chance("leading one", 0.5)
    given = table[None] if leading else table
    grids = []
    for i in range(d.integer("grids", 1, 3)):
        kind = d.choice(f"grid{i}.kind", ("any", "source", "one kept"), (4, 1, 1))
        grid = (d.integer(f"grid{i}.h", 1, side), d.integer(f"grid{i}.w", 1, side))
        grid = source if kind == "source" else (source[0], grid[1]) if kind == "one kept" else grid
        grids.append(grid)
    d.note("grids", (source, grids))
    single = len(grids) == 1 and d.chance("single", 0.7)
    shown = [written(d, f"grid{i}", g) for i, g in enumerate(grids)]
    shown = [g if not isinstance(g, int) else (g, g) for g in shown]
    keep = d.chance("keep", 0.3)
    named = source if source[0] != source[1] or d.chance("source_grid", 0.3) else None
    arguments = {
        "flavor": flavor,
        "num_prefix_tokens": d.as_number("prefix", prefix),
        "source_grid": named,
        "keep": keep,
    }

    def results() -> list[Tensor]:
        r = d.call("resample_pos_embed", given, shown[0] if single else shown, **arguments)
        return [r] if single else r

    got = results()
    if keep and not wants and d.chance("changed", 0.5):
        table.mul_(0.5)
        got = results()
    checks, kept = [], []
    for grid, result in zip(grids, got, strict=True):
        want, bound = table_at(table, prefix, source, grid, flavor)
        assert not leading or result.shape[0] == 1
        result = result[0] if leading else result
        kept.append((result, want))
        checks.append(derived(f"grid {grid}", result, want, bound, dtype))
        checks.append(exact(f"prefix of {grid}", result[:prefix], table[:prefix]))
    if wants:
        g = [torch.randn(r.shape, generator=d.generator, dtype=torch.float64).to(dtype) for r, _ in kept]
        torch.autograd.backward([r for r, _ in kept], g)
        (want,) = torch.autograd.grad([w for _, w in kept], table, [x.double() for x in g])
        # Every grid's gradient is rounded to the table's dtype, and so are their sums.
        size = torch.zeros(table.shape, dtype=torch.float64)
        wide, bound = arithmetic(dtype), torch.zeros(table.shape, dtype=torch.float64)
        for grid, x in zip(grids, g, strict=True):
            part, error = _adjoint(x, table, prefix, source, grid, flavor, wide)
            size, bound = size + part, bound + error
        bound = bound + (0 if len(grids) == 1 else 2 * len(grids)) * unit(dtype) * size
        # Autograd of the float64 value: through a cast to the table's dtype, hence its rounding.
        checks.append(derived("gradient", table.grad, want, bound + unit(dtype) * size, dtype))
    return checks


def _adjoint(g: Tensor, table: Tensor, prefix: int, source, grid, flavor: str, wide) -> tuple[Tensor, Tensor]:
    """Sums of absolute terms of the gradient of one grid, and the roundings of its arithmetic."""
    mode, antialias, offset = FLAVORS[flavor]
    head = g[:prefix].double().abs()
    if grid == source and (source[0] == source[1] or not offset):
        size = g.double().abs()
        return size, torch.zeros_like(size)
    factors = tuple((n + offset) / m for n, m in zip(grid, source, strict=True)) if offset else None
    rule = resize_of(source, None if factors else grid, mode, antialias, None, factors, table.dtype).transposed()
    map_ = g[prefix:].double().T.unflatten(1, grid)[None]
    size = rule.magnitude(map_)[0].flatten(1).T
    bound = linear_bound(rule, map_, wide)[0].flatten(1).T
    return torch.cat([head, size]), torch.cat([torch.zeros_like(head), bound])


def resample_patch_embed(d: Draw) -> list[Comparison]:
    dtype = d.dtype()
    old = (d.integer("old.h", 1, 9), d.integer("old.w", 1, 9))
    new = (d.integer("new.h", 1, 9), d.integer("new.w", 1, 9))
    weight = values(d, "weight", (d.integer("width", 1, 5), d.integer("channels", 1, 3), *old), dtype)
    weight = laid_out(d, "weight", weight).detach().requires_grad_(d.chance("gradient", 0.3))
    mode, antialias = drawn_rule(d)
    if d.chance("rule left out", 0.4):
        mode, antialias, rule = "bicubic", True, {}
    else:
        rule = {"mode": mode, "antialias": antialias}
    if d.backend is not None:
        return []  # plain torch: it has no backends
    result = d.call("resample_patch_embed", weight, written(d, "new", new), **rule)
    if old == new:
        return [exact("result", result, weight)]
    # The pseudo-inverse of the whole resize of a patch, as FlexiViT writes it.
    rows, columns = resize_of(old, new, mode, antialias, dtype=dtype).steps[0]
    whole = np.kron(rows.numpy(), columns.numpy())
    inverse = torch.from_numpy(np.linalg.pinv(whole))
    condition = np.linalg.cond(whole) if min(whole.shape) else 1.0
    flat = weight.detach().double().flatten(2)
    want = (flat @ inverse).unflatten(2, new)
    wide = arithmetic(dtype)
    sizes = [torch.from_numpy(np.abs(np.linalg.pinv(m.numpy()))) for m in (rows, columns)]
    size = torch.einsum("dcij,iy,jx->dcyx", weight.detach().double().abs(), *sizes)
    roundings = (old[0] + old[1] + 8) * unit(wide) + 64 * min(condition, 1e12) * unit(torch.float64)
    least = (old[0] * old[1] + new[0] * new[1]) * smallest(wide)
    checks = [derived("result", result, want, roundings * (size + size.max()) + least, dtype)]
    if weight.requires_grad:
        g = torch.randn(result.shape, generator=d.generator, dtype=torch.float64).to(dtype)
        result.backward(g)
        want = (g.double().flatten(2) @ inverse.T).unflatten(2, old)
        size = torch.einsum("dcyx,iy,jx->dcij", g.double().abs(), *sizes)
        bound = (roundings + (new[0] + new[1]) * unit(wide)) * (size + size.max()) + least
        checks.append(derived("gradient", weight.grad, want, bound, dtype))
    return checks
