"""``murf-fast bench jbu``: FeatUp's upsampler by output size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console

from murf_fast.cli.bench.sizes import CHANNELS, SIZES, Row, bilinear, print_table, rows_of
from murf_fast.nn import JBUStack

SCALE = 16


def rows(device: str, sizes: Sequence[int] = SIZES, channels: int = CHANNELS) -> list[Row]:
    """JBUStack and, as the floor, bilinear interpolation, of one image in float32."""
    stack = JBUStack(channels).to(device).eval()
    result = []
    for size in sizes:
        n = size // SCALE
        source = torch.randn(1, n, n, channels, device=device).permute(0, 3, 1, 2)
        guidance = torch.randn(1, 3, size, size, device=device)
        calls = {"JBUStack": lambda s=source, g=guidance: stack(s, g), "bilinear": bilinear(source, SCALE * n)}
        result += rows_of(size, device, channels, calls)
    return result


def main(console: Console) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print_table(f"JBUStack, x{SCALE}", rows(device), device, console)
