"""What the commands are given: images of a folder, a model, sizes that would run for very long."""

from __future__ import annotations

import math
from pathlib import Path

from murf_fast._pillow import read, size
from murf_fast.anomaly.datasets import SUFFIXES
from murf_fast.anomaly.detector import MultiResolutionDetector
from murf_fast.cli.anomaly.weights import Weights, load
from murf_fast.cli.demo.run import MOST_PATCHES


class Folder:
    """The images of a folder and its subfolders, opened one by one."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise ValueError(f"{folder} holds no image ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self):
        return map(read, self.paths)


def encoder(weights: str | Path | None) -> Weights:
    return load(weights)


def check_size(detector: MultiResolutionDetector, path: Path) -> None:
    """Raises where an image would run for very long, by its header."""
    most = max(math.prod(grid) for grid in detector.grids(size(path), str(path)))
    if most > MOST_PATCHES:
        raise ValueError(
            f"{path} has {most:,} patches at the largest scale, more than {MOST_PATCHES:,}; make the banks with fewer "
            "--pixels or smaller --scales"
        )
