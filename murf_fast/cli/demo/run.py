"""The demo from photo to table and picture."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import murf_fast
from murf_fast import _extension
from murf_fast.cli import meter
from murf_fast.cli.demo import backbone as backbones
from murf_fast.cli.demo import jbu, pca, picture, pipeline
from murf_fast.cli.demo.operations import Operation, operations
from murf_fast.nn.vit.principal import fused_projection

SECONDS = 1.0  # for both sides of an operation
# Attention is quadratic: so many patches of one resolution take minutes on a CPU, ten times as many hours.
MOST_PATCHES = 2**15
PICTURE, NUMBERS = "murf_fast_demo.png", "murf_fast_demo.json"


@dataclass(frozen=True)
class Side:
    """What one implementation of an operation takes, and how far it is from float64."""

    seconds: float
    peak_bytes: int | None
    error: float  # in parts of the largest exact value


@dataclass(frozen=True)
class Row:
    operation: str
    result: str
    fast: Side
    reference: Side


def run(
    photo_path: Path, out: Path, weights: Path | None, resolutions: list[int], longest: int, console: Console
) -> list[Row]:
    """Runs the demo, prints its table, and writes the picture and the numbers into ``out``."""
    photo = pipeline.read_photo(photo_path)
    image, grid = pipeline.normalized(photo), pipeline.grid_of(photo, longest)
    out.mkdir(parents=True, exist_ok=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("backbone", total=None)
        backbone = backbones.load(weights)
        too_small = [r for r in resolutions if r < backbone.patch]
        if too_small:
            raise ValueError(f"resolutions must be at least the patch size, {backbone.patch}, got {too_small}")
        largest = math.isqrt(MOST_PATCHES) * backbone.patch
        if max(resolutions) > largest:
            raise ValueError(f"resolutions must be at most {largest}, got {[r for r in resolutions if r > largest]}")
        maps = []
        for resolution in resolutions:
            progress.update(task, description=f"encoding at {resolution} x {resolution}")
            maps.append(pipeline.encode(backbone, image, resolution))
        rows, todo = [], operations(maps, grid, image)
        progress.update(task, total=len(todo) + 1)
        for operation in todo:
            progress.update(task, description=operation.name)
            rows.append(_row(operation))
            progress.advance(task)
        progress.update(task, description="picture")
        _draw(photo, image, maps, resolutions, grid, backbone.description, out / PICTURE)
    level = "reference (no extension)" if _extension.load_error() else f"native, {_extension.current_level()}"
    facts = {
        "photo": f"{photo_path.name}, {photo.width} x {photo.height}",
        "backbone": backbone.description,
        "resolutions": ", ".join(
            f"{r} x {r} -> {m.shape[2]} x {m.shape[3]}" for r, m in zip(resolutions, maps, strict=True)
        ),
        "grid": f"{grid[1]} x {grid[0]} pixels, {sum(m.shape[1] for m in maps)} channels",
        "fast path": f"{level}, {torch.get_num_threads()} threads, float32",
    }
    _print(rows, facts, console)
    record = {
        "murf_fast": murf_fast.__version__,
        "torch": torch.__version__,
        **facts,
        "rows": [asdict(r) for r in rows],
    }
    (out / NUMBERS).write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"picture: {escape(str(out / PICTURE))}\nnumbers: {escape(str(out / NUMBERS))}", soft_wrap=True)
    return rows


def _row(operation: Operation) -> Row:
    calls = (operation.fast, operation.reference)
    results, peaks = zip(*(meter.observed(call) for call in calls), strict=True)
    errors = operation.errors(results)
    del results
    seconds = [median(times) for times in meter.interleaved(calls, seconds=SECONDS)]
    fast, plain = (Side(*values) for values in zip(seconds, peaks, errors, strict=True))
    return Row(operation.name, operation.result, fast, plain)


def _draw(photo: Any, image: Any, maps: Any, resolutions: Any, grid: Any, backbone: str, path: Path) -> None:
    fused = fused_projection(maps, grid)[0]
    small = photo.resize((grid[1], grid[0]))
    panels = [picture.Panel("Photo", f"{photo.width} × {photo.height} px", np.asarray(small))]
    for resolution, m in zip(resolutions, maps, strict=True):
        single = pca.colours(pca.single_projection(m, grid, fused)).numpy()
        title = f"{resolution} × {resolution}"
        panels.append(picture.Panel(title, f"{m.shape[2]} × {m.shape[3]} tokens, {m.shape[1]} channels", single))
    small = jbu.smallest(maps)
    if small is not None:
        height, width = maps[small].shape[2:]
        finer = pca.colours(pca.upsampled_projection(maps[small], image, grid, fused)).numpy()
        title = f"{resolutions[small]} × {resolutions[small]}, FeatUp's JBU"
        panels.append(picture.Panel(title, f"{16 * height} × {16 * width}, levels trained for CLIP", finer))
    channels, largest = sum(m.shape[1] for m in maps), max(m.shape[2] for m in maps)
    side = f"{largest} × {largest}"
    panels.append(picture.Panel("MuRF, fused", f"{side} grid, {channels} channels", pca.colours(fused).numpy()))
    footer = f"First three principal components of each feature map as red, green, blue. Backbone: {backbone}."
    picture.draw(panels, footer, path)


def _print(rows: list[Row], facts: dict[str, str], console: Console) -> None:
    for name, value in facts.items():
        console.print(f"[bold]{name}[/]: {escape(value)}", soft_wrap=True, highlight=False)
    title = "murf_fast against plain PyTorch in float32, on these maps"
    table = Table(title=title, title_justify="left", show_lines=True, pad_edge=False)
    table.add_column("operation")
    table.add_column("by", no_wrap=True)
    for name in ("time", "speed-up", "memory", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        sides = (row.fast, row.reference)
        table.add_row(
            f"[bold]{row.operation}[/]\n{row.result}",
            "murf_fast\nPyTorch",
            "\n".join(_milliseconds(side.seconds) for side in sides),
            f"[bold green]{row.reference.seconds / row.fast.seconds:.1f}x[/]",
            "\n".join(_mebibytes(side.peak_bytes) for side in sides),
            "\n".join(f"{side.error:.1e}" for side in sides),
        )
    console.print(table)
    measurable = rows[0].fast.peak_bytes is not None
    console.print(
        "time: median of interleaved calls. memory: peak resident memory of a call above that before it, with its "
        f"result{'' if measurable else ' (not measurable on this system)'}. error: largest deviation from float64, "
        "over the largest value (of labels: how far the chosen logit is below the largest). Heads are random weights.",
        style="dim",
        highlight=False,
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.0f} MiB"
