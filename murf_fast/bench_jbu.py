"""``murf-fast bench jbu``: latency and peak memory of FeatUp's upsampler by output size, as in AnyUp's Table 10."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from murf_fast import native
from murf_fast.demo.measure import observed
from murf_fast.nn import JBUStack

SIZES = (112, 224, 448, 1024)
CHANNELS = 384  # of a small ViT
SCALE = 16
SECONDS, FEWEST, MOST = 2.0, 3, 50


@dataclass(frozen=True)
class Row:
    size: int  # side of the output in pixels
    method: str
    seconds: float
    peak_bytes: int | None  # of a call above those before it, its result included
    result_bytes: int


def rows(device: str, sizes: Sequence[int] = SIZES, channels: int = CHANNELS) -> list[Row]:
    """JBUStack and, as the floor, bilinear interpolation, of one image in float32."""
    stack = JBUStack(channels).to(device).eval()
    result = []
    for size in sizes:
        n = size // SCALE
        source = torch.randn(1, n, n, channels, device=device).permute(0, 3, 1, 2)
        guidance = torch.randn(1, 3, size, size, device=device)
        grid = (SCALE * n, SCALE * n)
        calls = {
            "JBUStack": lambda s=source, g=guidance: stack(s, g),
            "bilinear": lambda s=source, g=grid: F.interpolate(s, g, mode="bilinear", align_corners=False),
        }
        for method, call in calls.items():
            with torch.no_grad():
                call()
                peak = _peak(call, device)
                result.append(Row(size, method, _seconds(call, device), peak, 4 * channels * grid[0] * grid[1]))
    return result


def print_table(table_of: Sequence[Row], device: str, console: Console) -> None:
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if device == "cpu" and not native.load_error():
        where += f", {native.current_level()}"
    table = Table(
        title=f"JBUStack, {CHANNELS} channels, x{SCALE}, float32, batch 1: {where}",
        title_justify="left",
        pad_edge=False,
    )
    for name in ("output", "method"):
        table.add_column(name, no_wrap=True)
    for name in ("time", "peak memory", "of it result"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in table_of:
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


def main(console: Console) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print_table(rows(device), device, console)


def _peak(call: Callable, device: str) -> int | None:
    if device != "cuda":
        return observed(call)[1]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _seconds(call: Callable, device: str) -> float:
    """Median of calls, each waited for."""
    times: list[float] = []
    while len(times) < FEWEST or (len(times) < MOST and sum(times) < SECONDS):
        start = time.perf_counter()
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        del result
    return median(times)
