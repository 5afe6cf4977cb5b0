"""``murf-fast bench featsharp``: FeatSharp by factor beside its encoder at the full resolution (its Figure 14)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from murf_fast import _extension
from murf_fast.cli import meter
from murf_fast.nn import FeatSharp, MultiResolutionEncoder

FACTORS = (1, 2, 3, 4)
PATCH, GRID = 14, 32  # a view has 448^2 pixels
SECONDS = 4.0  # for each factor


@dataclass(frozen=True)
class Row:
    factor: int
    grid: int  # rows and columns of the result
    featsharp: float  # seconds of an image
    encoder: float  # of the same image, in one sequence


def rows(device: str, factors: Sequence[int] = FACTORS, grid: int = GRID, **shape: int) -> list[Row]:
    """A ViT-S/14 with random weights, one image, both in turns; half precision on a GPU, float32 on a CPU."""
    from transformers import Dinov2Config, Dinov2Model

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, **shape}
    model = Dinov2Model(Dinov2Config(image_size=PATCH * grid, patch_size=PATCH, **config))
    model = model.eval().requires_grad_(False).to(device, dtype)
    result = []
    for factor in factors:
        size = factor * grid * PATCH
        image = torch.randn(1, 3, size, size, device=device, dtype=dtype)
        sharp = FeatSharp(model, factor, size=grid * PATCH).requires_grad_(False).eval().to(device, dtype)
        whole = MultiResolutionEncoder(model, [size])
        calls = [lambda m=sharp, x=image: m(x), lambda m=whole, x=image: m(x).maps[0]]
        for call in calls:
            call()
        times = meter.interleaved(calls, device, seconds=SECONDS, fewest=1)
        result.append(Row(factor, factor * grid, *map(median, times)))
    return result


def crossover(rows: Sequence[Row]) -> float | None:
    """The factor from which FeatSharp takes less time than its encoder, between two rows on a line of the ratio's
    logarithm; None if it does not up to the last one.
    """
    excess = [math.log(row.featsharp / row.encoder) for row in rows]
    first = next((i for i in range(len(rows)) if all(e < 0 for e in excess[i:])), None)
    if not first:  # at once, or never
        return None if first is None else float(rows[0].factor)
    before, after = excess[first - 1], excess[first]
    share = before / (before - after)
    return rows[first - 1].factor + share * (rows[first].factor - rows[first - 1].factor)


def main(console: Console) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if device == "cpu" and not _extension.load_error():
        where += f", {_extension.current_level()}"
    found = rows(device)
    dtype = "bfloat16" if device == "cuda" else "float32"
    title = f"FeatSharp on ViT-S/14 at {GRID * PATCH}^2, {dtype}, batch 1: {where}"
    table = Table(title=title, title_justify="left", pad_edge=False)
    for name in ("factor", "grid", "views", "FeatSharp", "encoder at that resolution", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found:
        views = 1 if row.factor == 1 else 1 + row.factor**2
        times = (f"{seconds * 1e3:.1f} ms" for seconds in (row.featsharp, row.encoder))
        table.add_row(
            str(row.factor), f"{row.grid} x {row.grid}", str(views), *times, f"{row.featsharp / row.encoder:.2f}"
        )
    console.print(table)
    at = crossover(found)
    says = f"no crossover up to {found[-1].factor}" if at is None else f"FeatSharp is the faster from {at:.1f} on"
    console.print(
        f"time: median of an image. {says}. Random weights: they do not change the cost.", style="dim", highlight=False
    )
