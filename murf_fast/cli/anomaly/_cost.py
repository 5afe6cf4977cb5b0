"""What a fit will take, said before it begins."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from murf_fast.anomaly import _description
from murf_fast.anomaly.detector import MultiResolutionDetector
from murf_fast.cli.anomaly._images import counted, shown


def tell_cost(
    detector: MultiResolutionDetector,
    of_images: Sequence[Sequence[tuple[Any, ...]]],
    out: Path,
    console: Console,
    what: str = "",
    *,
    option: str = "--out",
    rows_before: int | None = None,
) -> None:
    """Patches, rows and bytes before the first image; refused where the disk has not so many.

    ``rows_before`` are those of banks that grow: they are copied.
    """
    like = detector.encoder.family.like
    patches = [sum(math.prod(grid) for grid in of_image) for of_image in of_images]
    banks = len(_description.places(detector.encoder))
    counted_patches, up_to = patches, ""
    if detector.references is not None and rows_before is None:
        # Which ones is not known yet.
        counted_patches = sorted(patches)[-max(1, int(detector.references * len(patches))) :]
        up_to = f"the {counted(len(counted_patches), 'reference')} of them have up to "
    rows = sum(counted_patches) * len(detector.encoder.layers) + (rows_before or 0)
    size = rows * detector.encoder.family.width * like.dtype.itemsize
    enlarged = detector.enlarge and detector.pixels is not None
    each = f"{min(patches):,} to {max(patches):,}" if min(patches) < max(patches) else f"{patches[0]:,}"
    console.print(
        f"{what}{counted(len(of_images), 'image')} of {each} patches at all scales"
        f"{f', enlarged to {(detector.pixels or 0) / 1e6:g} megapixels' if enlarged else ''}: "
        f"{up_to}{rows:,} rows in {counted(banks, 'bank')}, {in_bytes(size)}"
        f"{f', with the {rows_before:,} rows that are there' if rows_before else ''}",
        markup=False,
        soft_wrap=True,
    )
    there = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise ValueError(f"{option} needs {in_bytes(size)}, {shown(there)} has {in_bytes(free)} left")


def in_bytes(count: float) -> str:
    power = min(4, int(math.log10(max(count, 1)) / 3))
    return f"{count / 1000**power:.4g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
