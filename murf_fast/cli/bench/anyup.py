"""``murf-fast bench anyup``: AnyUp by output size, as in its Table 10."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console

from murf_fast.cli.bench.sizes import CHANNELS, SIZES, Row, bilinear, print_table, rows_of
from murf_fast.nn import AnyUp

PATCH = 16  # pixels of a side of the backbone's patches


def rows(device: str, sizes: Sequence[int] = SIZES, channels: int = CHANNELS) -> list[Row]:
    """AnyUp with both window rules and, as the floor, bilinear interpolation, of one image in float32."""
    models = {f"AnyUp, {rule}": AnyUp(windows=rule).to(device).eval() for rule in ("dense", "natten")}
    result = []
    for size in sizes:
        n = size // PATCH
        source = torch.randn(1, n, n, channels, device=device).permute(0, 3, 1, 2)
        image = torch.randn(1, 3, size, size, device=device)
        calls = {name: lambda m=model, i=image, s=source: m(i, s) for name, model in models.items()}
        result += rows_of(size, device, channels, calls | {"bilinear": bilinear(source, size)})
    return result


def main(console: Console) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print_table(f"AnyUp, x{PATCH}", rows(device), device, console)
