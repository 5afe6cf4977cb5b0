"""``murf-fast extract``: checks what it was given, extracts with a progress bar, says what there is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from murf_fast._image_paths import shown
from murf_fast.cli._interrupts import INTERRUPTED
from murf_fast.cli._ray_options import Cluster
from murf_fast.cli._terminal import parsed
from murf_fast.cli.anomaly._images import LISTED, counted
from murf_fast.cli.anomaly._inputs import device_of
from murf_fast.cli.extract.model import Recipe
from murf_fast.data import _records
from murf_fast.data._reading import BrokenImageError
from murf_fast.data.extraction import Machines, Progress, extract
from murf_fast.data.formats import FORMATS
from murf_fast.data.layout import DTYPES, Layout
from murf_fast.data.settings import FUSIONS, Options
from murf_fast.data.sources import open_source
from murf_fast.data.sources.item import Source

BROKEN = 1  # exit status
LARGEST = 1 << 14  # pixels of a side
HEADS = ("segmentation", "depth")
MODEL_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Job:
    """What the command was given."""

    source: str
    out: Path
    weights: str | None = None
    sizes: str = "518"
    layers: str | None = None
    norm: bool | None = None
    fuse: str = "concat"
    grid: str | None = None
    dtype: str | None = None
    model_dtype: str = "float32"
    form: str = "safetensors"
    head: Path | None = None
    head_kind: str = "segmentation"
    depth_range: str | None = None
    column: str | None = None
    batch: int = 16
    shard: int | None = None
    readers: int = 2
    device: str = "cpu"
    threads: int | None = None
    strict: bool = False
    verify: bool = False
    ray: bool = False
    address: str | None = None
    workers: int | None = None


def run(job: Job, console: Console) -> int:
    """Extracts, and returns the exit status."""
    recipe, options = _recipe(job), _options(job)
    uses_ray = job.ray or job.address is not None
    cluster = Cluster(job.ray, job.address, job.workers, job.threads if uses_ray else None)
    cluster.check(job.device)
    if uses_ray:
        from murf_fast.data import _ray  # noqa: F401  (what it needs besides is missed before any work)
    device = torch.device(job.device) if uses_ray else device_of(job.device)
    if job.threads is not None and not uses_ray:
        torch.set_num_threads(job.threads)
    machines = Machines(device, job.readers, uses_ray, job.address, job.workers, job.threads or torch.get_num_threads())
    source = open_source(job.source, job.column)
    if source.others:
        console.print(f"{source.others} other files are left alone", markup=False)
    with cluster.started(job.device, console):
        return _run(job, source, recipe, options, machines, console)


def _run(job: Job, source: Source, recipe: Recipe, options: Options, machines: Machines, console: Console) -> int:
    status = _Status(console)
    try:
        with status.bar(len(source.items)) as progress:
            records = extract(
                source,
                job.out,
                recipe,
                options,
                machines,
                strict=job.strict,
                verify=job.verify,
                progress=progress,
            )
    except KeyboardInterrupt:
        console.print(
            f"interrupted: what is written of {counted(len(source.items), 'image')} stays in {shown(job.out)}, "
            "the same command goes on",
            markup=False,
            soft_wrap=True,
        )
        return INTERRUPTED
    except BrokenImageError as error:
        console.print(f"{shown(error)}; what is written stays in {shown(job.out)}", markup=False, soft_wrap=True)
        return BROKEN
    failed = [f for record in records for f in record.failed]
    done = sum(len(record.names) for record in records)
    size = sum(file["bytes"] for record in records for file in record.files)
    console.print(
        f"{counted(done, 'image')} in {counted(len(records), 'shard')} of {job.form}, {size / 1e6:,.1f} MB, in "
        f"{shown(job.out)}",
        markup=False,
        soft_wrap=True,
    )
    if failed:
        console.print(f"{counted(len(failed), 'image')} broken, see {shown(job.out / _records.FAILED)}", markup=False)
        for failure in failed[:LISTED]:
            console.print(f"  {shown(failure.reason)}", markup=False, soft_wrap=True)
    return BROKEN if failed else 0


def _recipe(job: Job) -> Recipe:
    if job.model_dtype not in MODEL_DTYPES:
        raise ValueError(f"--model-dtype must be one of {', '.join(MODEL_DTYPES)}, got {job.model_dtype!r}")
    if job.head_kind not in HEADS:
        raise ValueError(f"--head-kind must be one of {', '.join(HEADS)}, got {job.head_kind!r}")
    if job.head is not None and not job.head.is_file():
        raise ValueError(f"--head must be a file of weights, got {shown(job.head)}")
    layers = None if job.layers is None else tuple(parsed(job.layers, int))
    if layers is not None and not layers:
        raise ValueError(f"--layers must be numbers such as 7,9,11, got {job.layers!r}")
    limits = None if job.depth_range is None else tuple(parsed(job.depth_range, float))
    if limits is not None and (len(limits) != 2 or job.head_kind != "depth"):
        raise ValueError(f"--depth-range must be two numbers, for --head-kind depth, got {job.depth_range!r}")
    sizes = tuple(_size(part, "--sizes") for part in job.sizes.replace(",", " ").split())
    if not sizes:
        raise ValueError("--sizes must be pixels such as 266,518 or 266x518, got none")
    dtype = DTYPES[job.model_dtype]
    return Recipe(job.weights, sizes, layers, job.norm, job.head, job.head_kind, limits, dtype)


def _options(job: Job) -> Options:
    for option, value, known in (("--format", job.form, FORMATS), ("--fuse", job.fuse, FUSIONS)):
        if value not in known:
            raise ValueError(f"{option} must be one of {', '.join(known)}, got {value!r}")
    if job.dtype is not None and job.dtype not in MODEL_DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(MODEL_DTYPES)}, got {job.dtype!r}")
    grid = None if job.grid is None else _size(job.grid, "--grid")
    return Options(job.fuse, grid, job.dtype, job.form, job.batch, job.shard)


def _size(text: str, option: str) -> tuple[int, int]:
    """``518`` or ``266x518``: (height, width)."""
    numbers = parsed(text.lower().replace("x", " "), int)
    if len(numbers) not in (1, 2) or not all(0 < n <= LARGEST for n in numbers):
        raise ValueError(f"{option} must be pixels such as 518 or 266x518, up to {LARGEST}, got {text!r}")
    return numbers[0], numbers[-1]


class _Status:
    """The bar: images, images per second, time left."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def bar(self, images: int) -> Iterator[Progress]:
        columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        with Bar(*columns, console=self._console) as bar:
            task = bar.add_task("images", total=images, start=False)

            def begin(_: int, done: int, layout: Layout) -> None:
                arrays = ", ".join(f"{a.name} {'x'.join(map(str, a.shape))} {a.dtype}" for a in layout.arrays)
                self._console.print(f"{arrays}; {layout.bytes_per_image / 1e6:.4g} MB an image", markup=False)
                if done:
                    self._console.print(f"{done} of {counted(images, 'image')} are there from before")
                bar.start_task(task)
                bar.update(task, completed=done)
                bar.tasks[0].fields["before"] = done

            yield Progress(begin, lambda count: bar.update(task, advance=count))


class _Rate(ProgressColumn):
    """Images per second of this run."""

    def render(self, task: Any) -> Text:
        seconds, count = task.elapsed, task.completed - task.fields.get("before", 0)
        return Text(f"{count / seconds:.3g} images/s" if seconds and count else "- images/s")
