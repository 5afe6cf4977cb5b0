"""``murf-fast anomaly add``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from murf_fast.anomaly import _files
from murf_fast.cli.anomaly._configuration import described
from murf_fast.cli.anomaly._cost import tell_cost
from murf_fast.cli.anomaly._images import counted, find, grids, readable, shown, tell_skipped
from murf_fast.cli.anomaly._inputs import device_of, loaded
from murf_fast.cli.anomaly._steps import Steps
from murf_fast.cli.anomaly.fit import tell_range


@dataclass(frozen=True)
class Job:
    """What the command was given."""

    bank: Path
    images: list[Path]
    weights: str | None
    device: str
    batch: int | None
    held_out: int
    skip_broken: bool
    force: bool
    resume: bool


def add(job: Job, console: Console) -> None:
    _check_finished(job)
    files, broken = readable(find(job.images, console), job.skip_broken, decode=False)
    vit, detector = loaded(job.bank, job.weights, device_of(job.device))
    console.print(vit.description, markup=False)
    for line in described(detector.settings):
        console.print(line, markup=False, soft_wrap=True)
    grids(detector, files)  # before large ones are decoded
    files, damaged = readable(files, job.skip_broken, decode=True)
    broken |= damaged
    before = sum(map(len, detector.banks_))
    tell_cost(detector, grids(detector, files), job.bank, console, option="the bank", rows_before=before)
    paths = [file.path for file in files]
    with Steps(console) as steps:
        try:
            detector.add(
                iter(paths),
                in_place=True,
                overwrite=job.force,
                resume=job.resume,
                held_out=job.held_out,
                batch=job.batch,
                progress=steps.of("images", len(paths)),
            )
        except KeyboardInterrupt:
            if steps.done("images"):
                console.print(
                    f"stopped after {steps.done('images')} images; the bank is as it was, and the same command with "
                    "--resume goes on"
                )
            raise
    console.print(
        f"{counted(len(files), 'image')} added: {counted(detector.images_, 'image')}, "
        f"{sum(map(len, detector.banks_))} rows (before: {before}) in {shown(job.bank)}",
        markup=False,
        soft_wrap=True,
    )
    tell_range(detector.normal_, console)
    tell_skipped(broken, console)


def _check_finished(job: Job) -> None:
    """Before the weights are loaded, in the command's words."""
    if not (job.bank / _files.INDEX).exists():
        raise ValueError(f"{shown(job.bank)} holds no bank; `murf-fast anomaly fit` makes one")
    unfinished = (job.bank / _files.UNFINISHED).exists()
    if job.resume and not unfinished:
        raise ValueError(
            f"{shown(job.bank)} holds no addition that did not finish, so --resume would add images that may be in it "
            "already"
        )
    if unfinished and not job.resume and not job.force:
        raise ValueError(
            f"{shown(job.bank)} holds an addition that did not finish; --resume goes on, --force starts it anew"
        )
