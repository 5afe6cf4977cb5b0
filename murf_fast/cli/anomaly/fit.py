"""``murf-fast anomaly fit``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from murf_fast.anomaly.detector import MultiResolutionDetector
from murf_fast.cli.anomaly._inputs import Folder, check_size, encoder


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
    detector = MultiResolutionDetector(vit.encoder(layers, scales), **options)
    for path in folder.paths:
        check_size(detector, path)
    with Progress(console=console) as bar:
        task = bar.add_task("images", total=len(folder))
        detector.fit(folder, progress=lambda done, _: bar.update(task, completed=done))
    detector.save(out)
    rows = sum(len(bank) for bank in detector.banks_)
    console.print(f"{len(folder)} images, {len(detector.banks_)} banks, {rows} rows in {out}")
