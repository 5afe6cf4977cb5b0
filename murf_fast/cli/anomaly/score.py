"""``murf-fast anomaly score``."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from murf_fast import _pillow
from murf_fast.anomaly.detector import MultiResolutionDetector
from murf_fast.anomaly.normal_range import NormalRange
from murf_fast.cli.anomaly._images import ImageFile, find, grids, readable, shown, tell_skipped
from murf_fast.cli.anomaly._inputs import device_of, encoder
from murf_fast.cli.anomaly._labels import labels, separation
from murf_fast.cli.anomaly._picture import Scale, draw
from murf_fast.cli.anomaly._scores import MAP_TYPES, SUFFIXES, Row, ScoreFiles, write_map
from murf_fast.cli.anomaly.weights import Weights

PICTURE = Path("map.png")  # of one image
LISTED = 10  # scores that are printed; files hold all


@dataclass(frozen=True)
class Job:
    """What the command was given."""

    bank: Path
    images: list[Path]
    out: Path | None
    scores: list[Path]
    maps: Path | None
    map_type: str
    weights: str | None
    device: str
    batch: int | None
    vmax: float | None
    threshold: float | None
    labelled: bool
    skip_broken: bool
    any_precision: bool


def score(job: Job, console: Console) -> None:
    is_one = len(job.images) == 1 and not job.images[0].is_dir()
    out = PICTURE if is_one and job.out is None else job.out
    _check_outputs(job, is_one, out)
    files, broken = readable(find(job.images, console), job.skip_broken, decode=False)
    if job.labelled:
        labels(files)
    device = device_of(job.device)
    vit = encoder(job.weights)
    try:
        detector = _loaded(job, vit, device)
    except ValueError:
        vit = encoder(job.weights, as_stored=True)  # halves were rounded before they became float32
        if next(vit.model.parameters()).dtype == torch.float32:
            raise
        detector = _loaded(job, vit, device)
    grids(detector, files)  # before large ones are decoded
    files, damaged = readable(files, job.skip_broken, decode=True)
    broken |= damaged
    defective = labels(files) if job.labelled else [None] * len(files)
    normal = detector.normal_
    threshold = job.threshold if job.threshold is not None or normal is None else normal.score
    line = "" if normal is None else f"; line: highest pixel of {normal.images} held-out"
    note = f"{len(detector.banks_)} banks of {detector.images_} images{line}; {vit.description}"
    with ScoreFiles(job.scores) as written, Progress(console=console, disable=is_one) as bar:
        task = bar.add_task("images", total=len(files))
        results = detector.score_many((file.path for file in files), batch=job.batch)
        for file, anomaly, label in zip(files, results, defective, strict=True):
            heat = anomaly.map.cpu().numpy()
            written.add(_row(file, anomaly.score, heat, threshold, label))
            if job.maps is not None:
                write_map(heat, job.maps / file.name, job.map_type)
            if out is not None:
                picture = out if is_one else out / file.name.with_name(f"{file.name.name}.png")
                picture.parent.mkdir(parents=True, exist_ok=True)
                title = f"{shown(file.path.name)}: image score {anomaly.score:.4g}"
                draw(_pillow.read(file.path), heat, _scale(normal, heat, job.vmax), title, note, picture)
            bar.update(task, advance=1)
        apart = separation([row.score for row in written.rows], defective) if job.labelled else None
        about = {"bank": str(job.bank), "weights": vit.description, "threshold": threshold}
        written.finish({**about, "labelled": apart and dataclasses.asdict(apart)}, broken)
    _tell(written.rows, console)
    if threshold is not None:
        whose = "--threshold" if job.threshold is not None else "the largest of the bank's held-out normal images"
        taken = sum(row.is_defect for row in written.rows)
        console.print(f"{taken} of {len(files)} at or above {threshold:.6g}, {whose}")
    if is_one:
        low, high = float(heat.min()), float(heat.max())
        console.print(f"map {low:.6g} to {high:.6g}; picture in {shown(out)}", markup=False, soft_wrap=True)
    if apart is not None:
        console.print(f"image AUROC {apart.auroc:.4f}; F1 {apart.f1:.4f} with --threshold {apart.threshold:.9g}")
    if normal is None and out is not None:
        console.print("the bank has no range of normal images, so every map has colours of its own; fit it again")
    tell_skipped(broken, console)


def _loaded(job: Job, vit: Weights, device: torch.device) -> MultiResolutionDetector:
    vit.model.to(device)
    return MultiResolutionDetector.load(job.bank, vit.encoder_of(job.bank), any_precision=job.any_precision)


def _check_outputs(job: Job, is_one: bool, out: Path | None) -> None:
    if is_one and out.is_dir():
        raise ValueError(f"--out must be a picture's file name, {shown(out)} is a folder")
    for option, folder in (("--maps", job.maps), ("--out", None if is_one else out)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ValueError(f"{option} must be a folder, {shown(folder)} is a file")
    for option, number in (("--threshold", job.threshold), ("--vmax", job.vmax)):
        if number is not None and not math.isfinite(number):
            raise ValueError(f"{option} must be a number, got {number}")
    if job.map_type not in MAP_TYPES:
        raise ValueError(f"--map-type must be one of {', '.join(MAP_TYPES)}, got {job.map_type!r}")
    if is_one and out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out must end as a picture does, such as {PICTURE}, got {shown(out)}")
    for folder in (job.maps, out.parent if is_one else out):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):  # before any work
                pass
    for path in job.scores:
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"--scores must end in {' or '.join(SUFFIXES)}, got {shown(path)}")


def _scale(normal: NormalRange | None, heat: np.ndarray, vmax: float | None) -> Scale:
    """The bank's, so that maps can be compared; the map's own where the bank has none."""
    low, high = normal.limits if normal is not None else (float(heat.min()), float(heat.max()))
    return Scale(low, high if vmax is None else vmax, None if normal is None else normal.highest)


def _row(file: ImageFile, score: float, heat: np.ndarray, threshold: float | None, label: bool | None) -> Row:
    is_defect = None if threshold is None else score >= threshold
    return Row(str(file.path), score, float(heat.max()), *heat.shape, is_defect, label)


def _tell(rows: list[Row], console: Console) -> None:
    """The image score of one; of many the highest, where to look first."""
    if len(rows) == 1:
        console.print(f"image score {rows[0].score:.6g}")
        return
    ranked = sorted(rows, key=lambda row: -row.score)
    for row in ranked[:LISTED]:
        console.print(f"{row.score:12.6g}  {shown(row.image)}", markup=False, highlight=False, soft_wrap=True)
    if len(ranked) > LISTED:
        console.print(f"and {len(ranked) - LISTED} images of lower scores")
