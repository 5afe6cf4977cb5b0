"""``murf-fast anomaly fit`` and ``murf-fast anomaly score``."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib import colormaps
from rich.console import Console
from rich.progress import Progress

from murf_fast._pillow import read, size
from murf_fast.anomaly.detector import MultiResolutionDetector
from murf_fast.cli.demo import backbone
from murf_fast.cli.demo.picture import Panel, draw
from murf_fast.cli.demo.run import MOST_PATCHES

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


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


def encoder(weights: Path | None) -> backbone.Backbone:
    found = backbone.load(weights)
    if found.is_random:
        raise ValueError("no weights named or reachable, and random ones find no anomaly: name a folder by --weights")
    return found


def fit(
    images: Path,
    out: Path,
    weights: Path | None,
    scales: list[float],
    layers: list[int],
    options: dict,
    console: Console,
) -> None:
    folder = Folder(images)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, {out} is a file")
    vit = encoder(weights)
    console.print(vit.description)
    detector = MultiResolutionDetector(vit.model, layers, scales, **options)
    for path in folder.paths:
        check_size(detector, path)
    with Progress(console=console) as bar:
        task = bar.add_task("images", total=len(folder))
        detector.fit(folder, progress=lambda done, _: bar.update(task, completed=done))
    detector.save(out)
    rows = sum(len(bank) for bank in detector.banks_)
    console.print(f"{len(folder)} images, {len(detector.banks_)} banks, {rows} rows in {out}")


def score(bank: Path, image: Path, out: Path, weights: Path | None, console: Console) -> None:
    if out.is_dir():
        raise ValueError(f"--out must be a picture's file name, {out} is a folder")
    size(image)
    vit = encoder(weights)
    detector = MultiResolutionDetector.load(bank, vit.model)
    check_size(detector, image)
    pixels = read(image)
    found = detector.score(pixels)
    heat = found.map.cpu().numpy()
    low, high = float(heat.min()), float(heat.max())
    colours = colormaps["inferno"]((heat - low) / max(high - low, 1e-12))[..., :3]
    photo = pixels / 255
    panels = [
        Panel(image.name, f"{pixels.shape[1]} x {pixels.shape[0]}", photo),
        Panel("distance to normal patches", f"{low:.3g} to {high:.3g}", colours),
        Panel("both", f"image score {found.score:.4g}", 0.45 * photo + 0.55 * colours),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(panels, f"{len(detector.banks_)} banks of {detector.images_} images; {vit.description}", out)
    console.print(f"image score {found.score:.6g}; map {low:.6g} to {high:.6g}; picture in {out}")


def check_size(detector: MultiResolutionDetector, path: Path) -> None:
    """Raises where an image would run for very long, by its header."""
    most = max(math.prod(grid) for grid in detector.grids(size(path), str(path)))
    if most > MOST_PATCHES:
        raise ValueError(
            f"{path} has {most:,} patches at the largest scale, more than {MOST_PATCHES:,}; make the banks with fewer "
            "--pixels or smaller --scales"
        )
