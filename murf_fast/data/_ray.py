"""The shards of an extraction by Ray's actors: `ray.data.map_batches`, one shard a batch, one worker an actor.

Every shard is worked on by the same :class:`Worker` as without Ray, and written by the actor: the folder must lie where
all machines see it. What comes back is the shard's record. An actor that dies is started again by Ray and its shard
given out again; a shard whose record is there is not worked on twice, and an image that takes every actor down is
given up.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.data
import torch

from murf_fast._ray_cluster import joined, room, told
from murf_fast.data import _attempts, _records
from murf_fast.data._attempts import Attempts
from murf_fast.data._reading import BrokenImageError
from murf_fast.data._records import Record
from murf_fast.data._worker import Shard, Task, Worker
from murf_fast.data.settings import Make
from murf_fast.data.sources.item import Item


def records(
    task: Task, make: Make, shards: list[Shard], machines: Any, step: Callable[[int], None]
) -> Iterator[Record]:
    """The record of every shard as it comes; ``step`` hears of its images.

    Raises:
        BrokenImageError, OSError, ValueError: As :class:`Worker` and its shards; no cluster answers, or it has no room.
        RuntimeError: Ray gave up; the message is its own.
    """
    if not shards:
        return
    with _connected(machines.address), _noted(task.folder):
        gpus = 1 if machines.device.type == "cuda" else 0
        count = min(len(shards), room(machines.workers, machines.threads, gpus))
        rows = [{"shard": s.number, "items": json.dumps(s.items)} for s in shards]
        found = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            batch_size=1,
            fn_constructor_args=(task, make, machines.device, machines.threads),
            compute=ray.data.ActorPoolStrategy(size=count),
            num_cpus=machines.threads,
            num_gpus=gpus,
        )
        try:
            for row in found.iter_rows():
                record = _received(task, row)
                step(len(record.names) + len(record.failed))
                yield record
        except ray.exceptions.RayError as error:
            raise told(error) from error


@contextlib.contextmanager
def _noted(folder: Path) -> Iterator[None]:
    """What actors note of their attempts, which is of this run alone."""
    _attempts.forget(folder)
    try:
        yield
    finally:
        _attempts.forget(folder)


class _Actor:
    """A worker in a process of Ray's."""

    def __init__(self, task: Task, make: Make, device: torch.device, threads: int) -> None:
        torch.set_num_threads(threads)
        self._task, self._worker = task, Worker(task, make, device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What a user can put right goes back as text: an exception would be tried again."""
        (number,), (items,) = batch["shard"], batch["items"]
        shard = Shard(int(number), [Item(*item) for item in json.loads(str(items))])
        try:
            self._write(shard)
        except BrokenImageError as error:
            return _answer(number, "broken", str(error))
        except OSError as error:
            return _answer(number, "disk", str(error))
        return _answer(number, "", "")

    def _write(self, shard: Shard) -> None:
        try:
            _records.read_record(self._task.folder, shard.number, self._task.layout)
        except FileNotFoundError:
            self._worker.record(shard, Attempts(self._task.folder, shard.number))


def _answer(number: int, error: str, reason: str) -> dict[str, Any]:
    return {"shard": [number], "error": [error], "reason": [reason]}


def _received(task: Task, row: dict[str, Any]) -> Record:
    if row["error"] == "broken":
        raise BrokenImageError(row["reason"])
    if row["error"]:
        raise OSError(row["reason"])
    return _records.read_record(task.folder, int(row["shard"]), task.layout)


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """A cluster; the progress of `ray.data` itself is not shown."""
    with joined(address):
        context, log = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
        shown, context.enable_progress_bars = context.enable_progress_bars, False
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            context.enable_progress_bars = shown
            log.setLevel(level)
