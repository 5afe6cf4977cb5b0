"""The folder of an extraction while it runs: one run at a time, of one configuration, on from where one stopped."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from murf_fast._files import read_json, write_json, write_whole
from murf_fast._image_paths import shown
from murf_fast.data import _records
from murf_fast.data._records import FORMAT, LOCK, RECORDS, SETTINGS, VERSION, Record, ShardFiles
from murf_fast.data.formats._format import Format
from murf_fast.data.layout import Layout
from murf_fast.data.settings import differing


class Output:
    """A folder that this run alone writes to, until the block ends.

    Raises:
        OSError: It cannot be made or written to.
        ValueError: It is a file, holds other things, or another run is writing to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out must be a folder, {shown(folder)} is a file")
        inside = {p.name for p in folder.iterdir()} - {LOCK} if folder.exists() else set()
        if inside and SETTINGS not in inside:
            raise ValueError(f"--out must be a new folder or one of an extraction, {shown(folder)} holds other files")
        self._is_new = not inside
        self._lock = FileLock(folder / LOCK, timeout=0)

    def __enter__(self) -> Output:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(f"another run is writing to {shown(self.folder)}") from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_new and not (self.folder / SETTINGS).exists():  # it was refused before any work
            (self.folder / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it is no longer empty
                self.folder.rmdir()
        self._lock.release()

    def begin(self, settings: dict[str, Any], layout: Layout, form: Format, verify: bool = False) -> list[Record]:
        """Notes the configuration, and gives the records of what an earlier run of the same has done; ``verify``: with
        their checksums compared, which reads all of it.

        Raises:
            OSError: The disk has not the room for the rest, or cannot be written to.
            ValueError: An earlier run was of another configuration, or what it wrote is damaged.
        """
        told = {"format": FORMAT, "version": VERSION, "settings": settings, "layout": layout.as_json()}
        if (self.folder / SETTINGS).exists():
            self._compare(told)
            _records.remove_parts(self.folder)
        done = self._done(layout, form, verify)
        self._check_room(layout, layout.images - sum(len(r.names) + len(r.failed) for r in done))
        for path, data in form.common().items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / path, [data])
        (self.folder / RECORDS).mkdir(exist_ok=True)
        write_json(self.folder / SETTINGS, told)
        return done

    def _compare(self, told: dict[str, Any]) -> None:
        path = self.folder / SETTINGS
        try:
            old = read_json(self.folder, SETTINGS)
            settings, layout = old["settings"], old["layout"]
            if old["format"] != FORMAT or not isinstance(settings, dict):
                raise ValueError("it was not written by an extraction")
        except _records.DAMAGES as error:
            raise ValueError(f"{shown(path)} is damaged: {error}") from error
        names = differing(settings, told["settings"])
        if names or old.get("version") != VERSION or layout != told["layout"]:
            which = ", ".join(names) or "version of the folder"
            raise ValueError(
                f"{shown(self.folder)} is of another configuration: {which}; give the same, or another --out"
            )

    def _done(self, layout: Layout, form: Format, checksums: bool) -> list[Record]:
        """The shards that are there, with files of the lengths, or ``checksums``, that their records say."""
        done, files = [], ShardFiles(self.folder, form)
        for shard in range(layout.shards):
            try:
                record = _records.read_record(self.folder, shard, layout)
                files.check(record, checksums=checksums)
            except FileNotFoundError:
                continue
            except ValueError as error:
                path = self.folder / _records.RECORDS / _records.record_name(shard)
                raise ValueError(f"{error}; remove {shown(path)} and the same command makes its shard again") from error
            done.append(record)
        return done

    def _check_room(self, layout: Layout, images: int) -> None:
        needed, free = images * layout.bytes_per_image, shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(f"--out needs {needed / 1e9:.4g} GB, {shown(self.folder)} has {free / 1e9:.4g} GB left")

    def finish(self, layout: Layout, form: str, records: list[Record]) -> None:
        """The index, when every shard is there."""
        _records.write_index(self.folder, layout, form, sorted(records, key=lambda r: r.shard))
