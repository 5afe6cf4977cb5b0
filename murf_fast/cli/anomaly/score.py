"""``murf-fast anomaly score``."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from murf_fast.anomaly.detector import MultiResolutionDetector
from murf_fast.anomaly.result import Anomaly
from murf_fast.cli._ray_options import Cluster
from murf_fast.cli.anomaly._images import ImageFile, counted, find, grids, readable, shown, tell_skipped
from murf_fast.cli.anomaly._inputs import device_of, loaded
from murf_fast.cli.anomaly._labels import Mistakes, Separation, labels, separation
from murf_fast.cli.anomaly._pictures import Pictures
from murf_fast.cli.anomaly._scores import MAP_TYPES, SUFFIXES, Row, ScoreFiles, write_map
from murf_fast.cli.anomaly._threshold import FAIL, LABELLED, Threshold, check

PICTURE = Path("map.png")  # of one image
LISTED = 10  # scores that are printed; files hold all
DEFECT = 10  # exit status


@dataclass(frozen=True)
class Job:
    """What the command was given."""

    bank: Path
    images: list[Path]
    out: Path | None
    scores: list[Path]
    maps: Path | None
    map_type: str
    threshold: str | None
    pixel_threshold: float | None
    vmax: float | None
    labelled: bool
    fail_on_defect: bool
    weights: str | None
    device: str
    batch: int | None
    skip_broken: bool
    any_precision: bool
    cluster: Cluster


def score(job: Job, console: Console) -> int:
    """The exit status: 0, or with ``fail_on_defect`` that of a defect where an image fails or was not looked at."""
    with contextlib.ExitStack() as opened:
        return _score(job, opened, console)


def _score(job: Job, opened: contextlib.ExitStack, console: Console) -> int:
    is_one = len(job.images) == 1 and not job.images[0].is_dir()
    out = PICTURE if is_one and job.out is None else job.out
    _check_outputs(job, is_one, out)
    job.cluster.check(job.device)
    files, broken = readable(find(job.images, console), job.skip_broken, decode=False)
    if job.labelled or job.threshold == LABELLED:
        labels(files)
    device = device_of(job.device)
    opened.enter_context(job.cluster.started(job.device, console))
    cluster = opened.enter_context(job.cluster.joined(job.device))
    vit, detector = loaded(job.bank, job.weights, device, any_precision=job.any_precision, cluster=cluster)
    threshold = Threshold.of(job.threshold, detector.normal_)
    if job.fail_on_defect and threshold.score is None and threshold.source != LABELLED:
        raise ValueError("--fail-on-defect needs a --threshold: the bank has no range of normal images")
    grids(detector, files)  # before large ones are decoded
    files, damaged = readable(files, job.skip_broken, decode=True)
    broken |= damaged
    pictures = Pictures(detector, vit.description, job.vmax, job.pixel_threshold)
    places = [out if is_one or out is None else out / f.name.with_name(f"{f.name.name}.png") for f in files]
    with ScoreFiles(job.scores) as written:
        found = _found(job, files, detector, threshold, written, pictures, places, broken, console)
        about = {
            "bank": str(job.bank),
            "weights": vit.description,
            "threshold": found.threshold.score,
            "threshold_from": None if found.threshold.score is None else found.threshold.source,
            "pixel_threshold": found.threshold.line(job.pixel_threshold, detector.rules, detector.normal_)[0],
            "labelled": found.labelled(),
        }
        written.finish(about, broken)
    _tell(found, console)
    if is_one:
        low, high = found.range_of_last
        console.print(f"map {low:.6g} to {high:.6g}; picture in {shown(out)}", markup=False, soft_wrap=True)
    if detector.normal_ is None and out is not None:
        console.print("the bank has no range of normal images, so every map has colours of its own; fit it again")
    tell_skipped(broken, console)
    return DEFECT if job.fail_on_defect and (found.failed or broken) else 0


@dataclass(frozen=True)
class Found:
    """What the images score, and how well that tells labelled ones apart."""

    rows: list[Row]
    threshold: Threshold
    apart: Separation | None
    mistakes: Mistakes | None
    range_of_last: tuple[float, float]

    @property
    def failed(self) -> int:
        return sum(row.verdict == FAIL for row in self.rows)

    def labelled(self) -> dict[str, Any] | None:
        parts = [dataclasses.asdict(part) for part in (self.apart, self.mistakes) if part is not None]
        return {name: value for part in parts for name, value in part.items()} or None


def _found(
    job: Job,
    files: Sequence[ImageFile],
    detector: MultiResolutionDetector,
    threshold: Threshold,
    written: ScoreFiles,
    pictures: Pictures,
    places: Sequence[Any],
    broken: dict[Path, str],
    console: Console,
) -> Found:
    """Scores the images, and writes rows, maps and pictures; these last where the threshold is known last."""
    is_labelled = job.labelled or threshold.source == LABELLED
    label_of = dict(zip((f.path for f in files), labels(files), strict=True)) if is_labelled else {}
    place_of = dict(zip((f.path for f in files), places, strict=True))
    draws = places[0] is not None
    waits = draws and threshold.source == LABELLED
    with contextlib.ExitStack() as opened:
        bar = opened.enter_context(Progress(console=console, disable=len(files) == 1))
        waiting: Any = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="murf_fast-"))) if waits else None
        task = bar.add_task("images", total=len(files))
        scored: list[ImageFile] = []
        for file, anomaly in _results(job, files, detector, broken):
            heat = anomaly.map.cpu().numpy()
            verdict, label = threshold.verdict(anomaly.score), label_of.get(file.path)
            row = Row(str(file.path), anomaly.score, float(heat.max()), heat.shape[0], heat.shape[1], verdict, label)
            written.add(row)
            if job.maps is not None:
                write_map(heat, job.maps / file.name, job.map_type)
            if waits:
                np.save(waiting / f"{len(scored)}.npy", heat)
            elif draws:
                pictures.draw(file, heat, row, threshold, place_of[file.path])
            scored.append(file)
            bar.update(task, advance=1)
        scores = [row.score for row in written.rows]
        defective: list[bool] = [label_of[file.path] for file in scored] if is_labelled else []
        apart: Any = separation(scores, defective) if is_labelled else None
        if threshold.source == LABELLED:
            threshold = Threshold(apart.threshold, LABELLED)
            written.judge(threshold.verdict)
        if waits:
            task = bar.add_task("pictures", total=len(scored))
            for i, (file, row) in enumerate(zip(scored, written.rows, strict=True)):
                pictures.draw(file, np.load(waiting / f"{i}.npy"), row, threshold, place_of[file.path])
                bar.update(task, advance=1)
    knows = is_labelled and threshold.score is not None
    mistakes = Mistakes.of(scores, defective, cast("float", threshold.score)) if knows else None
    return Found(written.rows, threshold, apart, mistakes, (float(heat.min()), float(heat.max())))


def _results(
    job: Job, files: Sequence[ImageFile], detector: MultiResolutionDetector, broken: dict[Path, str]
) -> Iterator[tuple[ImageFile, Anomaly]]:
    """What the images say, in their order. A file that is broken or gone by now, though it was whole before the first
    was scored, is put among the ``broken`` ones where those are skipped, and the others go on.

    Raises:
        OSError, ValueError: A file is broken and not skipped, or all are.
    """
    left, scored = deque(files), 0
    while left:
        results = detector.score_many((file.path for file in tuple(left)), batch=job.batch)
        try:
            for anomaly in results:
                yield left.popleft(), anomaly
                scored += 1
        except (OSError, ValueError) as error:
            file = left.popleft()
            if not job.skip_broken or not (scored or left):
                raise
            broken[file.path] = str(error)


def _check_outputs(job: Job, is_one: bool, out: Any) -> None:
    if is_one and out.is_dir():
        raise ValueError(f"--out must be a picture's file name, {shown(out)} is a folder")
    for option, folder in (("--maps", job.maps), ("--out", None if is_one else out)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ValueError(f"{option} must be a folder, {shown(folder)} is a file")
    check(job.threshold)
    for option, number in (("--pixel-threshold", job.pixel_threshold), ("--vmax", job.vmax)):
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


def _tell(found: Found, console: Console) -> None:
    """The image score of one, of many the highest, where to look first; and what the threshold makes of them."""
    ranked = sorted(found.rows, key=lambda row: -row.score)
    if len(ranked) == 1:
        verdict = "" if ranked[0].verdict is None else f": {ranked[0].verdict.upper()}"
        console.print(f"image score {ranked[0].score:.6g}{verdict}")
    else:
        for row in ranked[:LISTED]:
            verdict = "" if row.verdict is None else f"{row.verdict.upper()}  "
            text = f"{row.score:12.6g}  {verdict}{shown(row.image)}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        if len(ranked) > LISTED:
            console.print(f"and {counted(len(ranked) - LISTED, 'image')} of lower scores")
    if found.threshold.score is not None:
        text = f"{found.failed} of {len(ranked)} fail, at or above {found.threshold}"
        console.print(text, markup=False, soft_wrap=True)
    if found.apart is not None:
        apart = found.apart
        console.print(f"image AUROC {apart.auroc:.4f}; F1 {apart.f1:.4f} with --threshold {apart.threshold:.9g}")
    if found.mistakes is not None:
        wrong = found.mistakes
        console.print(
            f"{wrong.missed} of {counted(wrong.defective, 'defective image')} pass, {wrong.rejected} of "
            f"{counted(wrong.good, 'good image')} fail"
        )
