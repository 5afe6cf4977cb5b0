"""The features of a source into a folder, on one machine or on many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from murf_fast._files import sha256_of_json
from murf_fast.data import _records
from murf_fast.data._encoding import Encoding
from murf_fast.data._output import Output
from murf_fast.data._records import Record
from murf_fast.data._worker import Shard, Task, Worker
from murf_fast.data.formats import FORMATS
from murf_fast.data.layout import Layout
from murf_fast.data.settings import Make, Options, model_fingerprint, settings_of
from murf_fast.data.sources.item import Source


@dataclass(frozen=True)
class Machines:
    """Where shards are worked on.

    Attributes:
        device: Of the model.
        readers: Processes that decode, for every model.
        ray: Whether by Ray's actors, on all machines of a cluster.
        address: Of the cluster; None: Ray's own rule, ``$RAY_ADDRESS``, one that runs here, else a new one of this
            machine.
        workers: Actors; None: as many as the cluster has room for.
        threads: CPU threads of every model.
    """

    device: torch.device
    readers: int = 2
    ray: bool = False
    address: str | None = None
    workers: int | None = None
    threads: int = 1


@dataclass(frozen=True)
class Progress:
    """What is heard of a run: ``begin(images, done, layout)`` before its first image, ``step(images)`` after some."""

    begin: Callable[[int, int, Layout], None] = lambda *_: None
    step: Callable[[int], None] = lambda _: None


def extract(
    source: Source,
    folder: Path,
    make: Make,
    options: Options,
    machines: Machines,
    *,
    strict: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> list[Record]:
    """Writes the features of every image; what an earlier run of the same configuration has written stays.

    Which images share a shard, and within it a batch, follows from the source and the options alone; so does every
    byte that is written, on processors of one kind with the same number of threads.

    ``strict``: stop at the first broken image. ``verify``: read what is there to compare its checksums; else lengths
    are compared, as files are in place only when they are whole.

    Returns:
        A record for every shard.

    Raises:
        OSError, ValueError: An argument is wrong, the folder is of another configuration or another run's, or a file
            cannot be written; the message names it. Shards that were written stay.
        ModuleNotFoundError: An optional library is needed and not installed.
    """
    progress = progress or Progress()
    if machines.ray:
        from murf_fast.data import _ray  # before any work
    with Output(folder) as output:
        murf = make(torch.device("cpu") if machines.ray else machines.device)
        arrays = Encoding(murf, options).arrays()
        settings = settings_of(murf, options, arrays, source)
        size = options.images_per_shard(arrays)
        layout = Layout(arrays, len(source.items), size, sha256_of_json(settings))
        form = FORMATS[options.form](layout)
        records = {r.shard: r for r in output.begin(settings, layout, form, verify)}
        if strict and (broken := _records.write_failed(folder, list(records.values()))):
            raise ValueError(f"--strict: {broken[0].reason}")
        progress.begin(layout.images, sum(layout.planned(shard) for shard in records), layout)
        task = Task(folder.resolve(), layout, replace(options, shard=size), model_fingerprint(murf), machines.readers)
        task = replace(task, column=source.column, strict=strict)
        waiting = [s for s in _shards(source, layout) if s.number not in records]
        if machines.ray:
            del murf  # it was for the fingerprint; the actors have their own
            found = _ray.records(task, make, waiting, machines, progress.step)
        else:
            found = _here(task, lambda device: murf, waiting, machines, progress.step)
        try:
            for record in found:
                records[record.shard] = record
                if record.failed:
                    _records.write_failed(folder, list(records.values()))
        finally:
            cast("Any", found).close()
        _records.write_failed(folder, list(records.values()))
        output.finish(layout, options.form, list(records.values()))
    return [records[shard] for shard in sorted(records)]


def _shards(source: Source, layout: Layout) -> Iterator[Shard]:
    for number in range(layout.shards):
        first = number * layout.shard
        yield Shard(number, source.items[first : first + layout.shard])


def _here(
    task: Task, make: Make, shards: list[Shard], machines: Machines, step: Callable[[int], None]
) -> Iterator[Record]:
    if shards:
        with Worker(task, make, machines.device) as worker:
            yield from worker.records(shards, step)
