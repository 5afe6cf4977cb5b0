"""The files of a folder of features: configuration, one record for every shard, the index, and what is checked.

```
extraction.json            the configuration, before the first image
records/000003.json        what is in shard 3, after its files are in place
data/000003.safetensors    or .parquet, .arrow; features.zarr for Zarr
features.json              the index, when all shards are there
failed.jsonl               images without features, and why
```

A shard is done when its record is there. Names of files follow from the format and the shard's number; none is taken
from a file.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from murf_fast._files import is_name, open_regular, read_json, sha256_of, sha256_of_json, write_json, write_whole
from murf_fast._image_paths import shown
from murf_fast.data.formats import FORMATS
from murf_fast.data.formats._format import Fetch, Format
from murf_fast.data.layout import Layout

FORMAT, VERSION = "murf_fast features", 1
SETTINGS, INDEX, FAILED, LOCK, RECORDS = "extraction.json", "features.json", "failed.jsonl", ".lock", "records"
DAMAGES = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Failure:
    """An image without features."""

    image: str
    reason: str


@dataclass(frozen=True)
class Record:
    """What is in a shard.

    Attributes:
        shard: Its number.
        fingerprint: Of the configuration it was made with.
        names: Of the images with features, in their order.
        positions: Of these among the shard's planned images, from 0.
        failed: The others.
        files: Of every file, in the order of its format, the ``sha256`` and the number of ``bytes``.
    """

    shard: int
    fingerprint: str
    names: list[str]
    positions: list[int]
    failed: list[Failure]
    files: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        content = asdict(self)
        return {**content, "sha256": sha256_of_json(content)}


def record_name(shard: int) -> str:
    return f"{shard:06}.json"


def write_record(folder: Path, record: Record) -> None:
    """In place when it is whole, whoever else writes the same."""
    path = folder / RECORDS / record_name(record.shard)
    write_whole(path, [json.dumps(record.as_json(), indent=2).encode() + b"\n"])


def read_record(folder: Path, shard: int, layout: Layout) -> Record:
    """Raises a FileNotFoundError where there is none, a ValueError that names it where it is damaged or another's."""
    path = folder / RECORDS / record_name(shard)
    try:
        _check_folders(folder, f"{RECORDS}/{path.name}")
        told = read_json(folder / RECORDS, path.name)
        checksum = told.pop("sha256")
        failed = [Failure(**f) for f in told["failed"]]
        record = Record(**{**told, "failed": failed})
        if checksum != sha256_of_json(told):
            raise ValueError("its checksum is not its own")
        _check_record(record, shard, layout)
    except FileNotFoundError:
        raise
    except DAMAGES as error:
        raise ValueError(f"{shown(path)} is damaged: {_reason(error)}") from error
    if record.fingerprint != layout.fingerprint:
        raise ValueError(f"{shown(path)} is of another configuration")
    return record


def _check_record(record: Record, shard: int, layout: Layout) -> None:
    planned = layout.planned(shard)
    numbers = [*record.positions, *(f["bytes"] for f in record.files)]
    if record.shard != shard or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("it is of another shard")
    if not all(isinstance(name, str) for name in [*record.names, *(f["sha256"] for f in record.files)]):
        raise ValueError("its names are none")
    increasing = all(a < b for a, b in zip([-1, *record.positions], [*record.positions, planned], strict=True))
    if not increasing or len(record.names) != len(record.positions):
        raise ValueError("its images are none of the shard")
    if len(record.names) + len(record.failed) != planned:
        raise ValueError(f"it has {len(record.names)} images and {len(record.failed)} broken ones of {planned}")


class ShardFiles:
    """The files of done shards, checked and mapped."""

    def __init__(self, folder: Path, form: Format) -> None:
        self._folder, self._form = folder, form

    def check(self, record: Record, *, checksums: bool) -> None:
        """Raises a ValueError that names the file which is missing, or is not what the record says."""
        for file, _ in self._mapped(record, checksums=checksums):
            file.close()

    def opened(self, record: Record, *, checksums: bool) -> Fetch:
        """What gives the arrays of an image; raises as :meth:`check`."""
        files = [memoryview(pages) for pages, _ in self._mapped(record, checksums=checksums)]
        try:
            return self._form.opened(record.shard, files, record.positions)
        except Exception as error:  # decoders of damaged headers raise anything
            raise self._damaged(self._form.paths(record.shard)[0], error) from error

    def _mapped(self, record: Record, *, checksums: bool) -> list[tuple[mmap.mmap, str]]:
        paths = self._form.paths(record.shard) if record.names else []
        if len(paths) != len(record.files):
            name = self._folder / RECORDS / record_name(record.shard)
            raise ValueError(f"{shown(name)} is damaged: it has {len(record.files)} files of {len(paths)}")
        found = []
        for path, told in zip(paths, record.files, strict=True):
            try:
                found.append((self._map(path, told, checksums), path))
            except DAMAGES as error:
                raise self._damaged(path, error) from error
        return found

    def _map(self, path: str, told: dict[str, Any], checksums: bool) -> mmap.mmap:
        _check_folders(self._folder, path)
        place = self._folder / path
        with open_regular(place.parent, place.name) as file:
            size = os.fstat(file.fileno()).st_size
            if size != told["bytes"]:
                raise ValueError(f"it has {size} bytes, its record says {told['bytes']}")
            if checksums and sha256_of(file) != told["sha256"]:
                raise ValueError("its checksum is not that of its record")
            # A private mapping, which torch takes without a warning; pages are read when they are looked at.
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)

    def _damaged(self, path: str, error: Exception) -> ValueError:
        return ValueError(f"{shown(self._folder / path)} is damaged or missing: {_reason(error)}")


def _check_folders(folder: Path, path: str) -> None:
    """The folders on the way to a file are folders, no links out of here."""
    for parent in reversed(PurePosixPath(path).parents[:-1]):
        if not stat.S_ISDIR((folder / parent).lstat().st_mode):
            raise ValueError(f"{parent} is not a folder")


def write_index(folder: Path, layout: Layout, form: str, records: list[Record]) -> None:
    """The last file of an extraction: shards and how many images each has."""
    shards = [{"images": len(r.names), "sha256": sha256_of_json(asdict(r))} for r in records]
    content = {"format": FORMAT, "version": VERSION, "kind": form, "layout": layout.as_json(), "shards": shards}
    write_json(folder / INDEX, {**content, "sha256": sha256_of_json(content)})


def read_index(folder: Path) -> tuple[Layout, str, list[dict[str, Any]]]:
    """Layout, format and shards. Raises a ValueError that names the folder or its index."""
    path = folder / INDEX
    try:
        told = read_json(folder, INDEX)
        checksum = told.pop("sha256", None)
        if told.get("format") != FORMAT or told.get("version") != VERSION:
            raise ValueError("it was not written by an extraction, or by that of another version")
        if checksum != sha256_of_json(told):
            raise ValueError("its checksum is not its own")
        layout = Layout.of_json(told["layout"])
        shards = told["shards"]
        counts = [s["images"] for s in shards]
        if told["kind"] not in FORMATS or len(shards) != layout.shards:
            raise ValueError("it is of another format")
        if not all(type(n) is int and 0 <= n <= layout.planned(i) for i, n in enumerate(counts)):
            raise ValueError("its shards are none that were extracted")
    except FileNotFoundError:
        what = "an extraction that is not finished" if (folder / SETTINGS).exists() else "no features"
        raise ValueError(f"{shown(folder)} holds {what}: {INDEX} is missing") from None
    except NotADirectoryError:
        raise ValueError(f"{shown(folder)} is not a folder") from None
    except DAMAGES as error:
        raise ValueError(f"{shown(path)} is damaged: {_reason(error)}") from error
    return layout, told["kind"], shards


def write_failed(folder: Path, records: list[Record]) -> list[Failure]:
    """One line of JSON for every image without features; no file where there is none."""
    failed = [f for r in sorted(records, key=lambda r: r.shard) for f in r.failed]
    path = folder / FAILED
    if not failed:
        path.unlink(missing_ok=True)
        return failed
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(json.dumps(asdict(f)) + "\n" for f in failed), encoding="utf-8")
    os.replace(part, path)
    return failed


def remove_parts(folder: Path) -> None:
    """What was being written when a process ended."""
    for inside, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not Path(inside, f).is_symlink()]
        for name in files:
            if name.endswith(".part") and is_name(name):
                with contextlib.suppress(FileNotFoundError):
                    Path(inside, name).unlink()


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
