"""The shards of an extraction by Ray's actors: `ray.data.map_batches`, one shard a batch, one worker an actor.

Every shard is worked on by the same :class:`Worker` as without Ray, and written by the actor: the folder must lie where
all machines see it. What comes back is the shard's record. An actor that dies is started again by Ray and its shard
given out again; a shard whose record is there is not worked on twice.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.data
import torch

from murf_fast.data import _records
from murf_fast.data._reading import BrokenImageError
from murf_fast.data._records import Record
from murf_fast.data._worker import Shard, Task, Worker
from murf_fast.data.settings import Make
from murf_fast.data.sources.item import Item

# Ends of remote tracebacks that are no bugs.
FOR_USERS = ("ValueError", "OSError", "FileNotFoundError", "PermissionError", "ModuleNotFoundError", "ImportError")


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
    with _connected(machines.address):
        gpus = 1 if machines.device.type == "cuda" else 0
        count = min(len(shards), _workers(machines.workers, machines.threads, gpus))
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
            raise _error(error) from error


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
            list(self._worker.records([shard]))


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
    """A cluster, which is left again if it was not there before; Ray's own progress is not shown."""
    was_there = ray.is_initialized()
    if not was_there:
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = f"no cluster answers at --address {address}" if address else "no cluster starts here"
            raise ValueError(f"Ray: {where}: {_last_line(error)}") from error
    context, log = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    shown, context.enable_progress_bars = context.enable_progress_bars, False
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = shown
        log.setLevel(level)
        if not was_there:
            ray.shutdown()


def _workers(wanted: int | None, threads: int, gpus: int) -> int:
    """Actors for which the cluster has processors, busy ones too: those are waited for."""
    there = ray.cluster_resources()
    room = int(there.get("CPU", 0)) // threads
    room = min(room, int(there.get("GPU", 0))) if gpus else room
    if room < (wanted or 1):
        of_gpu = ", each with a GPU" if gpus else ""
        raise ValueError(
            f"the cluster has room for {room} workers of {threads} CPU threads{of_gpu}, not for {wanted or 1}: fewer "
            "--workers or --threads"
        )
    return wanted or room


def _error(error: Exception) -> Exception:
    """What a worker said, as far as a user can put it right; else that Ray gave up, with all that it says."""
    kind, _, reason = _last_line(error).partition(": ")
    if kind in FOR_USERS:
        return ValueError(f"a worker of Ray: {reason}")
    return RuntimeError(f"Ray: {error}")


def _last_line(error: BaseException) -> str:
    """Of a remote traceback: what went wrong."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
