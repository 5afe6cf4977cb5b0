"""A folder of features as a dataset of torch."""

from __future__ import annotations

import bisect
import itertools
import operator
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from murf_fast._files import sha256_of_json
from murf_fast._image_paths import shown
from murf_fast.data import _records
from murf_fast.data.formats import FORMATS
from murf_fast.data.formats._format import Fetch
from murf_fast.data.layout import DTYPES

WHAT = "murf_fast.data.Features"


class Features(torch.utils.data.Dataset["dict[str, Tensor | str]"]):
    """The features that ``murf-fast extract`` wrote, of any of its formats, image by image.

    A map-style dataset: ``len``, indices, samplers (distributed ones too), DataLoaders with workers of any start
    method. Shards are mapped into memory when an image of theirs is first asked for, in every process by itself.

    Args:
        folder: What the command wrote, finished.
        checksums: Compare the sha256 of a shard with its record when it is first mapped, which reads all of it. Without
            it lengths and headers are still held against the index.

    Attributes:
        shapes: Of every array, without a batch, by name.
        dtypes: Likewise.

    Raises:
        TypeError: ``folder`` is no path.
        ValueError: It holds no finished extraction, or a file of it is damaged; the message names the file. Shards are
            looked at when they are first needed.
        ModuleNotFoundError: The format's library (zarr, pyarrow) is not installed.

    No pickle is read, and no file outside the folder; links are not followed.

    Memory: the names of all images; of a Parquet shard its last row group; pages of mapped files are the system's.
    """

    def __init__(self, folder: str | os.PathLike[str], *, checksums: bool = True) -> None:
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"{WHAT}: `folder` must be a path, got {type(folder).__name__}")
        if not isinstance(checksums, bool):
            raise TypeError(f"{WHAT}: `checksums` must be True or False, got {checksums!r}")
        self.folder, self._checksums = Path(folder), checksums
        self._layout, self._kind, self._shards = _records.read_index(self.folder)
        self._form = FORMATS[self._kind](self._layout)
        self._ends = list(itertools.accumulate(shard["images"] for shard in self._shards))
        self._names: dict[int, list[str]] = {}
        self._forget()
        self.shapes: Mapping[str, tuple[int, ...]] = {a.name: a.shape for a in self._layout.arrays}
        self.dtypes: Mapping[str, torch.dtype] = {a.name: DTYPES[a.dtype] for a in self._layout.arrays}

    def __len__(self) -> int:
        """Images with features; broken ones are not among them."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        """The arrays of an image by their names, copies, and its ``"name"``.

        Raises:
            IndexError: There are not so many.
            TypeError: ``index`` is no integer.
            ValueError: Its shard is damaged; the message names the file.
        """
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"{WHAT}: index {index} of {len(self)} images")
        index %= len(self)
        shard = bisect.bisect_right(self._ends, index)
        place = index - (self._ends[shard - 1] if shard else 0)
        if self._pid != os.getpid():  # after a fork; what the libraries hold open, and the lock, are the parent's
            self._forget()
        with self._lock:
            arrays = self._fetch(shard)(place)
            return {**arrays, "name": self._names[shard][place]}

    def names(self) -> Iterator[str]:
        """Of all images, in order; of a tar's the file and the member, of a table's the file and the row."""
        for shard in range(len(self._shards)):
            yield from self._record(shard).names

    def failed(self) -> Iterator[tuple[str, str]]:
        """The images without features, and why."""
        for shard in range(len(self._shards)):
            yield from ((f.image, f.reason) for f in self._record(shard).failed)

    def verify(self) -> None:
        """Reads every shard and compares its checksum; raises the ValueError that names the first damaged one."""
        files = _records.ShardFiles(self.folder, self._form)
        for shard in range(len(self._shards)):
            files.check(self._record(shard), checksums=True)

    def _fetch(self, shard: int) -> Fetch:
        if shard not in self._opened:
            record = self._record(shard)
            files = _records.ShardFiles(self.folder, self._form)
            self._opened[shard] = files.opened(record, checksums=self._checksums)
            self._names[shard] = record.names
        return self._opened[shard]

    def _record(self, shard: int) -> _records.Record:
        try:
            record = _records.read_record(self.folder, shard, self._layout)
        except FileNotFoundError:
            path = self.folder / _records.RECORDS / _records.record_name(shard)
            raise ValueError(f"{shown(path)} is damaged or missing: No such file or directory") from None
        if sha256_of_json(asdict(record)) != self._shards[shard]["sha256"]:
            path = self.folder / _records.RECORDS / _records.record_name(shard)
            raise ValueError(f"{shown(path)} is damaged: it is not that of {_records.INDEX}")
        return record

    def _forget(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._opened: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For processes that are started anew."""
        return {"folder": self.folder, "checksums": self._checksums}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], checksums=state["checksums"])  # type: ignore[misc]  # as pickle made it

    def __repr__(self) -> str:
        arrays = ", ".join(f"{a.name} {a.shape} {a.dtype}" for a in self._layout.arrays)
        return f"Features({str(self.folder)!r}: {len(self)} images, {arrays}, {self._kind})"
