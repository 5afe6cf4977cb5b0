"""What a fit will take, said before it begins."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from murf_fast.anomaly import _description
from murf_fast.anomaly.detector import MultiResolutionDetector
from murf_fast.cli.anomaly._images import counted, shown


def tell_cost(
    detector: MultiResolutionDetector, of_images: Sequence[Sequence[tuple]], out: Path, console: Console, what: str = ""
) -> None:
    """Patches, rows and bytes before the first image; refused where the disk has not so many."""
    like = detector.encoder.family.like
    patches = [sum(math.prod(grid) for grid in of_image) for of_image in of_images]
    banks = len(_description.places(detector.encoder))
    rows = sum(patches) * len(detector.encoder.layers)
    size = rows * detector.encoder.family.width * like.dtype.itemsize
    enlarged = detector.enlarge and detector.pixels is not None
    each = f"{min(patches):,} to {max(patches):,}" if min(patches) < max(patches) else f"{patches[0]:,}"
    console.print(
        f"{what}{counted(len(of_images), 'image')} of {each} patches at all scales"
        f"{f', enlarged to {detector.pixels / 1e6:g} megapixels' if enlarged else ''}: "
        f"{rows:,} rows in {counted(banks, 'bank')}, {_bytes(size)}",
        markup=False,
        soft_wrap=True,
    )
    there = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise ValueError(f"--out needs {_bytes(size)}, {shown(there)} has {_bytes(free)} left")


def _bytes(count: float) -> str:
    power = min(4, int(math.log10(max(count, 1)) / 3))
    return f"{count / 1000**power:.4g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
