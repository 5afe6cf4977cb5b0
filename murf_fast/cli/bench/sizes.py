"""Latency and peak memory of upsamplers by output size, as in AnyUp's Table 10."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from murf_fast import _extension
from murf_fast.cli import meter

SIZES = (112, 224, 448, 1024)
CHANNELS = 384  # of a small ViT
SECONDS = 2.0  # for each call


@dataclass(frozen=True)
class Row:
    size: int  # side of the output in pixels
    method: str
    seconds: float
    peak_bytes: int | None  # of a call above those before it, its result included
    result_bytes: int


def rows_of(size: int, device: str, channels: int, calls: dict[str, Callable[[], Tensor]]) -> list[Row]:
    """One row for each call."""
    rows = []
    for method, call in calls.items():
        with torch.no_grad():
            call()
            peak = meter.observed(call, device)[1]
            (times,) = meter.interleaved([call], device, seconds=SECONDS)
            rows.append(Row(size, method, median(times), peak, 4 * channels * size * size))
    return rows


def bilinear(source: Tensor, size: int) -> Callable[[], Tensor]:
    """The floor: the result is written, and little else."""
    return lambda: F.interpolate(source, (size, size), mode="bilinear", align_corners=False)


def print_table(title: str, rows: Sequence[Row], device: str, console: Console) -> None:
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if device == "cpu" and not _extension.load_error():
        where += f", {_extension.current_level()}"
    table = Table(
        title=f"{title}, {CHANNELS} channels, float32, batch 1: {where}",
        title_justify="left",
        pad_edge=False,
    )
    for name in ("output", "method"):
        table.add_column(name, no_wrap=True)
    for name in ("time", "peak memory", "of it result"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB"
        table.add_row(
            f"{row.size} x {row.size}",
            row.method,
            f"{row.seconds * 1e3:.1f} ms",
            peak,
            f"{row.result_bytes / 2**20:.0f} MiB",
            end_section=row.method == "bilinear",
        )
    console.print(table)
    console.print(
        "time: median. peak memory: of a call above that before it. Random weights: they do not change the cost.",
        style="dim",
        highlight=False,
    )
