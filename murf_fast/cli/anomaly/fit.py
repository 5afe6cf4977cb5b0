"""``murf-fast anomaly fit``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from murf_fast.anomaly import _files
from murf_fast.anomaly.detector import MultiResolutionDetector
from murf_fast.cli.anomaly._cost import tell_cost
from murf_fast.cli.anomaly._images import counted, find, grids, readable, shown, tell_skipped
from murf_fast.cli.anomaly._inputs import device_of, encoder


@dataclass(frozen=True)
class Job:
    """What the command was given, but for the detector's own options."""

    images: list[Path]
    out: Path
    weights: str | None
    device: str
    batch: int | None
    skip_broken: bool
    force: bool
    resume: bool
    held_out: int


def fit(job: Job, layers: list[int], scales: list[float], options: dict, console: Console) -> None:
    for path in job.images:
        if not path.exists():
            raise ValueError(f"{shown(path)} is not a folder, nor an image")
    if job.out.exists() and not job.out.is_dir():
        raise ValueError(f"--out must be a folder, {shown(job.out)} is a file")
    _check_free(job)
    files, broken = readable(find(job.images, console), job.skip_broken, decode=False)
    device = device_of(job.device)
    vit = encoder(job.weights)
    console.print(vit.description, markup=False)
    vit.model.to(device)
    detector = MultiResolutionDetector(vit.encoder(layers, scales), **options)
    grids(detector, files)  # before large ones are decoded
    files, damaged = readable(files, job.skip_broken, decode=True)
    broken |= damaged
    tell_cost(detector, grids(detector, files), job.out, console)
    done, coreset = 0, None
    with Progress(console=console) as bar:
        task = bar.add_task("images", total=len(files))

        def chosen(count: int, wanted: int) -> None:
            nonlocal coreset
            if coreset is None:
                coreset = bar.add_task("rows of the coreset", total=wanted)
            bar.update(coreset, completed=count)

        def progress(count: int, _: int | None) -> None:
            nonlocal done
            done = count
            bar.update(task, completed=count)

        try:
            detector.fit(
                iter(file.path for file in files),
                folder=job.out,
                overwrite=job.force,
                resume=job.resume,
                held_out=job.held_out,
                batch=job.batch,
                progress=progress,
                coreset_progress=chosen,
            )
        except KeyboardInterrupt:
            if done:
                console.print(f"stopped after {done} of {len(files)} images; the same command with --resume goes on")
            raise
    rows = sum(len(bank) for bank in detector.banks_)
    console.print(
        f"{counted(len(files), 'image')}, {counted(len(detector.banks_), 'bank')}, {rows} rows in {shown(job.out)}",
        markup=False,
        soft_wrap=True,
    )
    if detector.normal_ is not None:
        normal = detector.normal_
        console.print(
            f"{normal.images} held-out images score up to {normal.score:.4g}, their pixels up to {normal.highest:.4g}"
        )
    tell_skipped(broken, console)


def _check_free(job: Job) -> None:
    if job.force:
        return
    if (job.out / _files.INDEX).exists():
        raise ValueError(f"{shown(job.out)} holds a bank; --force replaces it")
    if (job.out / _files.UNFINISHED).exists() and not job.resume:
        raise ValueError(f"{shown(job.out)} holds a fit that did not finish; --resume goes on, --force starts anew")
