"""``murf-fast anomaly fit``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from murf_fast.anomaly import _files
from murf_fast.anomaly.normal_range import NormalRange
from murf_fast.cli._ray_options import Cluster
from murf_fast.cli.anomaly._configuration import described
from murf_fast.cli.anomaly._cost import tell_cost
from murf_fast.cli.anomaly._images import ImageFile, counted, find, grids, readable, shown, tell_skipped
from murf_fast.cli.anomaly._inputs import device_of, encoder
from murf_fast.cli.anomaly._settings import Settings
from murf_fast.cli.anomaly._steps import Steps


@dataclass(frozen=True)
class Job:
    """What the command was given."""

    images: list[Path]
    out: Path
    settings: Settings
    weights: str | None
    device: str
    batch: int | None
    skip_broken: bool
    force: bool
    resume: bool
    held_out: int
    cluster: Cluster


def fit(job: Job, console: Console) -> None:
    if job.out.exists() and not job.out.is_dir():
        raise ValueError(f"--out must be a folder, {shown(job.out)} is a file")
    _check_free(job)
    job.cluster.check(job.device)
    files, broken = readable(find(job.images, console), job.skip_broken, decode=False)
    with job.cluster.started(job.device, console):
        _fit(job, files, broken, console)


def _fit(job: Job, files: list[ImageFile], broken: dict[Path, str], console: Console) -> None:
    device = torch.device("cpu") if job.cluster.is_used else device_of(job.device)  # workers have devices of their own
    vit = encoder(job.weights)
    console.print(vit.description, markup=False)
    vit.model.to(device)
    detector = job.settings.detectors(vit)()
    for line in described(detector.settings):
        console.print(line, markup=False, soft_wrap=True)
    grids(detector, files)  # before large ones are decoded
    files, damaged = readable(files, job.skip_broken, decode=True)
    broken |= damaged
    tell_cost(detector, grids(detector, files), job.out, console)
    paths = [file.path for file in files]
    with job.cluster.joined(job.device) as cluster, Steps(console) as steps:
        try:
            detector.fit(
                # A list is decoded once more; where references are chosen it is gone through twice.
                paths if detector.references is not None else iter(paths),
                folder=job.out,
                overwrite=job.force,
                resume=job.resume,
                held_out=job.held_out,
                batch=job.batch,
                cluster=cluster,
                progress=steps.of("images", len(paths)),
                references_progress=steps.of("references"),
                coreset_progress=steps.of("coreset"),
            )
        except KeyboardInterrupt:
            if steps.done("images"):
                console.print(f"stopped after {steps.done('images')} images; the same command with --resume goes on")
            raise
    rows = sum(len(bank) for bank in detector.banks_)
    console.print(
        f"{counted(detector.images_, 'image')}, {counted(len(detector.banks_), 'bank')}, {rows} rows in "
        f"{shown(job.out)}",
        markup=False,
        soft_wrap=True,
    )
    tell_range(detector.normal_, console)
    tell_skipped(broken, console)


def tell_range(normal: NormalRange | None, console: Console) -> None:
    """The colours and the threshold of ``score``."""
    if normal is not None:
        console.print(
            f"{counted(normal.images, 'held-out image')} scored up to {normal.score:.4g}, their pixels up to "
            f"{normal.highest:.4g}"
        )


def _check_free(job: Job) -> None:
    if job.force:
        return
    if (job.out / _files.INDEX).exists():
        raise ValueError(f"{shown(job.out)} holds a bank; --force replaces it")
    if (job.out / _files.UNFINISHED).exists() and not job.resume:
        raise ValueError(f"{shown(job.out)} holds a fit that did not finish; --resume goes on, --force starts anew")
