"""``gaussian_bilateral_upsample``, with the weights of all cells for every pixel."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fuzz.cases_resize import FORMATS, check_layout
from fuzz.compare import Comparison, arithmetic
from fuzz.draw import DTYPES, Draw
from fuzz.evaluation import both_ways
from fuzz.maps import drawn_map, laid_out
from fuzz.resampling import resize_of

__all__ = ["gaussian_bilateral_upsample"]


@lru_cache(maxsize=4096)
def offsets_counted(center: tuple[int, int], grid: tuple[int, int], radius: int) -> Tensor:
    """How many offsets of a disk end, clamped to the grid, at each of its cells."""
    counts = torch.zeros(grid, dtype=torch.float64)
    for i in range(-radius, radius + 1):
        for j in range(-radius, radius + 1):
            if i * i + j * j <= radius * radius:
                y, x = center[0] + i, center[1] + j
                counts[min(max(y, 0), grid[0] - 1), min(max(x, 0), grid[1] - 1)] += 1
    return counts


def gaussian_bilateral_upsample(d: Draw) -> list[Comparison]:
    dtype, batch = d.dtype(), d.batch()
    guided = dtype if dtype == torch.float64 or d.chance("guidance as features", 0.6) else torch.float32
    grid, size = d.grid("grid", 3 if d.interpreted else 7), d.grid("size", 9 if d.interpreted else 17)
    radius = d.choice("radius", (1, 2) if d.interpreted else (1, 2, 3, 8))
    channels, guides = d.choice("channels", (1, 3, 8, 17, 33)), d.choice("guides", (1, 3, 4))
    wants = d.chance("gradients", 0.4)
    features = drawn_map(d, "features", (batch, channels, *grid), dtype, ("normal", "offset", "constant"), wants)
    guidance = drawn_map(d, "guidance", (batch, guides, *size), guided, ("normal", "constant"), wants)
    low = None
    if d.chance("low_guidance", 0.5):
        low = drawn_map(d, "low_guidance", (batch, guides, *grid), guided, ("normal",), wants)

    def drawn_cells(name: str, least: float, most: float) -> Tensor:
        x = least + (most - least) * torch.rand(batch, 1, *grid, generator=d.generator, dtype=torch.float64)
        dtypes = [t for t in DTYPES if t != torch.float64 or not d.interpreted]
        return laid_out(d, name, x.to(d.choice(f"{name}.dtype", dtypes))).detach().requires_grad_(wants)

    pitch = max(size[0] / grid[0], size[1] / grid[1])
    maps = {name: drawn_cells(name, 0.3 * pitch, 2 * pitch) for name in ("sigma_x", "sigma_y")}
    maps |= {"theta": drawn_cells("theta", -3.0, 3.0), "sigma_r": drawn_cells("sigma_r", 0.5, 3.0)}
    reach = d.number("reach", 0.2, 3.0) / pitch if d.chance("windows of several radii", 0.6) else None
    radii = torch.full((batch, 1, *size), radius)
    if reach is not None and batch:
        larger = torch.maximum(maps["sigma_x"], maps["sigma_y"]).detach().double()
        cells = reach * resize_of(grid, size, "bilinear")(larger)
        if bool(((cells - cells.round()).abs() < 1e-4).any()):
            reach = None  # a rounding decides
        else:
            radii = cells.ceil().clamp(1, radius).long()
    layout = d.choice("memory_format", FORMATS, (3, 1, 1))
    result = d.call(
        "gaussian_bilateral_upsample", features, guidance, *maps.values(), radius=d.as_number("radius", radius),
        reach=reach, low_guidance=low, memory_format=layout
    )  # fmt: skip
    assert result.dtype == dtype
    check_layout(result, features, layout)

    cell = [[(2 * p + 1) * n // (2 * m) for p in range(m)] for n, m in zip(grid, size, strict=True)]
    counted = torch.stack(
        [
            offsets_counted((cell[0][y], cell[1][x]), grid, int(radii[b, 0, y, x]))
            for b in range(batch)
            for y in range(size[0])
            for x in range(size[1])
        ]
        or [torch.zeros(grid, dtype=torch.float64)]
    )[: batch * size[0] * size[1]].view(batch, size[0] * size[1], grid[0] * grid[1])

    def formula(x, dtype):
        def away(axis: int) -> Tensor:
            """(pixels of the axis, its cells): distances in pixels, exact before they are rounded."""
            n, m = grid[axis], size[axis]
            exact = [[(p + 0.5) - (q + 0.5) * m / n for q in range(n)] for p in range(m)]
            return torch.tensor(exact, dtype=torch.float64).to(dtype)

        dy, dx = away(0)[:, None, :, None], away(1)[None, :, None, :]
        own = {name: x[name].flatten(1)[:, None] for name in maps}
        dy, dx = (t.expand(*size, *grid).reshape(1, size[0] * size[1], -1) for t in (dy, dx))
        cos, sin = own["theta"].cos(), own["theta"].sin()
        along, across = dx * cos + dy * sin, dy * cos - dx * sin
        sparse = x["low_guidance"] if low is not None else resize_of(size, grid, "bilinear")(x["guidance"])
        tones = (x["guidance"].flatten(2)[..., None] - sparse.flatten(2)[:, :, None]).square().sum(1)
        logs = -(along**2) / (2 * own["sigma_x"] ** 2 + 1e-8) - across**2 / (2 * own["sigma_y"] ** 2 + 1e-8)
        logs = logs - tones / (2 * own["sigma_r"] ** 2 + 1e-8) + counted.to(dtype).log()
        weights = logs.softmax(-1)
        return {"result": (weights @ x["features"].flatten(2).mT).mT.unflatten(2, size)}

    inputs = {"features": features, "guidance": guidance, **maps, "low_guidance": low}

    def terms(cotangents) -> dict[str, float]:
        """A weight's gradient is a difference of the values that its pixel can have; of one value, nothing is left."""
        if not cotangents or not cotangents["result"].numel():
            return {}
        values = float((cotangents["result"].abs().sum(1).amax() * features.detach().abs().amax()).double())
        return {f"gradient of {name}": values for name, x in inputs.items() if x is not None and x is not features}

    return both_ways(formula, inputs, {"result": result}, d.generator, arithmetic(dtype), terms)
