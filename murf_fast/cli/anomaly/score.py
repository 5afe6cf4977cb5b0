"""``murf-fast anomaly score``."""

from __future__ import annotations

from pathlib import Path

from matplotlib import colormaps
from rich.console import Console

from murf_fast._pillow import read, size
from murf_fast.anomaly.detector import MultiResolutionDetector
from murf_fast.cli.anomaly._inputs import check_size, encoder
from murf_fast.cli.demo.picture import Panel, draw


def score(bank: Path, image: Path, out: Path, weights: Path | None, console: Console) -> None:
    if out.is_dir():
        raise ValueError(f"--out must be a picture's file name, {out} is a folder")
    size(image)
    vit = encoder(weights)
    detector = MultiResolutionDetector.load(bank, vit.encoder_of(bank))
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
