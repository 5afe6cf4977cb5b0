"""Shards of images to files: what one process does, by itself or as one of many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from murf_fast._files import write_whole
from murf_fast.data import _records
from murf_fast.data._attempts import Attempts
from murf_fast.data._encoding import Encoding, problem
from murf_fast.data._reading import BrokenImageError, Readers
from murf_fast.data._records import Failure, Record
from murf_fast.data.formats import FORMATS
from murf_fast.data.layout import DTYPES, Content, Layout
from murf_fast.data.settings import Make, Options, model_fingerprint
from murf_fast.data.sources.item import Item

BATCHES_AHEAD = 2  # that are read, or being read, while one is encoded


@dataclass(frozen=True)
class Shard:
    """Images that are encoded, batch by batch, into files of their own."""

    number: int
    items: list[Item]


@dataclass(frozen=True)
class Task:
    """What a worker must know beside the shards.

    Attributes:
        folder: Where the files go; the same for all workers.
        layout: What goes into them.
        options: How it is made.
        model: Fingerprint of the model and its head.
        readers: Processes that decode.
        column: Of a table's images.
        strict: Stop at the first broken image.
    """

    folder: Path
    layout: Layout
    options: Options
    model: str
    readers: int
    column: str | None = None
    strict: bool = False


class Worker:
    """A model, readers, and the shards they are given.

    Args:
        task: What is to be done.
        make: Gives the model.
        device: Where it runs.

    Raises:
        ValueError: The model is another than that of the task.
    """

    def __init__(self, task: Task, make: Make, device: torch.device) -> None:
        murf = make(device)
        if model_fingerprint(murf) != task.model:
            raise ValueError("--weights or --head are others in a worker than where the run was started")
        self._task, self._form = task, FORMATS[task.options.form](task.layout)
        self._encoding = Encoding(murf, task.options)
        self._readers = Readers(task.readers, task.column)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._readers.__exit__(*error)

    def records(self, shards: Sequence[Shard], progress: Callable[[int], None] = lambda _: None) -> Iterator[Record]:
        """Writes shard by shard, and gives the record of each when it is there; ``progress`` hears of every batch.

        Raises:
            BrokenImageError: An image is broken, and the task strict.
            OSError: A file cannot be written; nothing of its shard is left.

        Memory: a shard's arrays, and the images of three batches.
        """
        items = (item for shard in shards for item in shard.items)
        pixels = self._readers.read(items, BATCHES_AHEAD * self._task.options.batch)
        for shard in shards:
            yield self._shard(shard, lambda _, its_items: [next(pixels) for _ in its_items], progress)

    def record(self, shard: Shard, attempts: Attempts) -> Record:
        """As :meth:`records` of one shard, which other workers may have died of: images that they died of are broken.

        Raises:
            BrokenImageError, OSError: As :meth:`records`.
        """
        try:
            if attempts.is_first:
                ahead = self._readers.read(shard.items, BATCHES_AHEAD * self._task.options.batch)
                record = self._shard(shard, lambda first, items: _noted(attempts, first, items, ahead))
            else:
                record = self._shard(shard, lambda first, items: self._carefully(attempts, first, items))
        except BaseException:
            attempts.end()
            raise
        attempts.end()
        return record

    def _shard(
        self,
        shard: Shard,
        read: Callable[[int, list[Item]], list[np.ndarray | BrokenImageError]],
        progress: Callable[[int], None] = lambda _: None,
    ) -> Record:
        """``read`` gives the pixels of a batch, of which it is told the first position and the items."""
        rows, failed, batch = _Rows(self._task.layout, len(shard.items)), [], self._task.options.batch
        for first in range(0, len(shard.items), batch):
            its_items = shard.items[first : first + batch]
            failed += self._batch(rows, first, its_items, read(first, its_items))
            progress(len(its_items))
        return self._written(shard, rows, failed)

    def _carefully(self, attempts: Attempts, first: int, items: list[Item]) -> list[np.ndarray | BrokenImageError]:
        """The pixels of a batch of a shard that workers died of: nothing is read ahead, and where the batch is to blame
        every image is encoded by itself first."""
        left = [i for i in range(first, first + len(items)) if attempts.given_up(i) is None]
        alone = attempts.one_by_one(left)
        found: list[np.ndarray | BrokenImageError] = []
        attempts.begin(left)
        for i, item in enumerate(items, first):
            reason = attempts.given_up(i)
            if reason is not None:
                found.append(BrokenImageError(f"{item.name}: {reason}"))
                continue
            if alone:
                attempts.begin([i])
            (pixels,) = self._readers.read([item], 0)
            if alone and not isinstance(pixels, BrokenImageError):
                self._encoding([pixels])
            found.append(pixels)
        if alone:
            attempts.begin(left)
        return found

    def _batch(self, rows: _Rows, first: int, items: list[Item], pixels: list[Any]) -> list[Failure]:
        """Encodes what can be read of a batch; the others are returned."""
        reasons = {i: str(p) for i, p in enumerate(pixels) if isinstance(p, BrokenImageError)}
        whole = [i for i in range(len(items)) if i not in reasons]
        self._refuse(reasons)
        encoded = self._encoding([pixels[i] for i in whole]) if whole else []
        for i, arrays in zip(whole, encoded, strict=True):
            reason = problem(arrays)
            if reason is None:
                rows.add(first + i, items[i].name, arrays)
            else:
                reasons[i] = f"{items[i].name}: {reason}"
        self._refuse(reasons)
        return [Failure(items[i].name, reasons[i]) for i in sorted(reasons)]

    def _refuse(self, reasons: dict[int, str]) -> None:
        if reasons and self._task.strict:
            raise BrokenImageError(f"--strict: {reasons[min(reasons)]}")

    def _written(self, shard: Shard, rows: _Rows, failed: list[Failure]) -> Record:
        """The shard's files, and then its record: from there on it is done."""
        folder, content = self._task.folder, rows.content()
        files = []
        for path, pieces in self._form.pieces(shard.number, content) if content.names else ():
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            files.append(write_whole(place, pieces))
        names, positions = list(content.names), list(content.positions)
        record = Record(shard.number, self._task.layout.fingerprint, names, positions, failed, files)
        _records.write_record(folder, record)
        return record


def _noted(
    attempts: Attempts, first: int, items: list[Item], pixels: Iterator[np.ndarray | BrokenImageError]
) -> list[np.ndarray | BrokenImageError]:
    attempts.begin(range(first, first + len(items)))
    return [next(pixels) for _ in items]


class _Rows:
    """The arrays of a shard, filled image by image."""

    def __init__(self, layout: Layout, images: int) -> None:
        self._arrays: dict[str, Tensor] = {
            a.name: torch.zeros(images, *a.shape, dtype=DTYPES[a.dtype], device="cpu") for a in layout.arrays
        }
        self._names: list[str] = []
        self._positions: list[int] = []

    def add(self, position: int, name: str, arrays: dict[str, Tensor]) -> None:
        for key, values in self._arrays.items():
            values[len(self._names)] = arrays[key]
        self._names.append(name)
        self._positions.append(position)

    def content(self) -> Content:
        arrays = {name: values[: len(self._names)] for name, values in self._arrays.items()}
        return Content(arrays, self._names, self._positions)
