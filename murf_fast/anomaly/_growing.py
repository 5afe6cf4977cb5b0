"""The banks of a fit while it runs: in files without a name, or in the folder that will hold them.

In a folder ``unfinished.json`` says which images are done, after their rows were written. So a fit that ended, however
it did, is told from a bank, and can go on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from murf_fast._files import BLOCK, open_regular, read_json, sync_folder, write_json
from murf_fast.anomaly import _files
from murf_fast.anomaly._files import UNFINISHED, WHAT, RowFile
from murf_fast.anomaly._selection import Selection

FORMAT = "murf_fast unfinished fit, version 2"  # version 1 told images apart in another way
OF_ENCODER = ("model", "layers", "norm", "scales")  # settings that are in the encoder's fingerprint, too
SECONDS = 1.0  # of work that the end of a process may cost
SHARE = 0.05  # of the time that writing to the disk what is done may take, where that would take longer


@dataclasses.dataclass(frozen=True)
class _Whole:
    """What is complete: so many images, what tells them from others, and the rows of every bank.

    One value, as an interruption may come between any two.
    """

    images: int
    seen: str
    rows: list[int]


class GrowingBanks:
    """One :class:`RowFile` for every bank.

    Args:
        places: Which layer and resolution each is of.
        folder: Where they stay, beside the detector that it may hold; None: in files without a name, which vanish with
            the process however it ends.
        settings: What decides about the rows; a fit goes on with the same alone.
        resume: Go on with the unfinished fit of the folder, if it holds one.

    Raises:
        ValueError: The unfinished fit is damaged or was made with other settings; another one writes to the folder.
        OSError: The folder cannot be made or written to.
    """

    def __init__(
        self, places: list[dict[str, str]], folder: Path | None, settings: dict[str, Any], resume: bool
    ) -> None:
        self.places, self._settings = places, settings
        self.folder: Path | Any = folder  # None: files without names
        self._whole = _Whole(0, "", [0] * len(places))
        self._lock: int | None = None
        if folder is None:
            self._next = math.inf
            self.files = [RowFile(tempfile.TemporaryFile(prefix="murf_fast-")) for _ in places]  # noqa: SIM115
            return
        self._next, self._is_new = 0.0, not folder.exists()
        _files.make_folder(folder)
        self._lock, self._home = _files.lock(folder), _files.Home.of(folder)
        try:
            if resume and (folder / UNFINISHED).exists():
                self._go_on()
            else:
                (folder / UNFINISHED).unlink(missing_ok=True)
                for i in range(len(places)):
                    self._selection_path(i).unlink(missing_ok=True)
                self.files = [_new(folder / f"{_files.bank_name(i)}.rows") for i in range(len(places))]
        except BaseException:
            self._unlock()
            raise

    @property
    def done(self) -> int:
        """Images whose rows are in the files."""
        return self._whole.images

    def begin_with(self, banks: list[Tensor]) -> None:
        """Copies the rows of banks that grow, before the first image."""
        for file, bank in zip(self.files, banks, strict=True):
            for block in bank.split(max(1, BLOCK // bank[:1].nbytes if len(bank) else 1)):
                file.append(block)
        self._whole = _Whole(0, "", [file.rows for file in self.files])

    def append(self, rows: list[Tensor | None], digest: str) -> None:
        """The rows of one image, per bank, None where it has none; and what tells the image from others."""
        for file, of_bank in zip(self.files, rows, strict=True):
            if of_bank is not None:
                file.append(of_bank)
        seen = _chained(self._whole.seen, digest)
        self._whole = _Whole(self.done + 1, seen, [file.rows for file in self.files])
        if time.monotonic() > self._next:
            self._tell()

    def check_seen(self, digests: list[str]) -> None:
        """After the images that are done were seen again, what tells them from others: whether they are the same."""
        if len(digests) < self.done or functools.reduce(_chained, digests, "") != self._whole.seen:
            raise ValueError(
                f"{WHAT}: {self.folder} holds a fit that stopped after {self.done} images, and the first "
                f"{self.done} of `images` are others, or have another foreground; give the same in the same order, or "
                "start anew"
            )

    def _tell(self) -> None:
        """Notes that what was appended is whole, when it is on the disk."""
        start = time.monotonic()
        for file in self.files:
            file.sync()
        like = self.files[0]
        content = {
            "format": FORMAT,
            "settings": self._settings,
            "width": like.width,
            "dtype": _files.NAMES[like.dtype],
            **dataclasses.asdict(self._whole),
        }
        write_json(self.folder / UNFINISHED, content)
        now = time.monotonic()
        self._next = now + max(SECONDS, (now - start) / SHARE)

    def mapped(self) -> list[Tensor]:
        """The rows of all images, when they are complete."""
        if self.folder is not None:
            self._tell()
        return [file.mapped(place) for file, place in zip(self.files, self.places, strict=True)]

    def selection(self, bank: int, rows: int, count: int, **of: object) -> Selection:
        """How far the choice of ``count`` of a bank's rows came; in a folder it is kept. ``of``: what decides about it
        besides the rows."""
        of = {**self._settings, "seen": self._whole.seen, "rows": rows, "count": count, **of}
        return Selection(None if self.folder is None else self._selection_path(bank), of, rows, count)

    def _selection_path(self, bank: int) -> Path:
        return self.folder / f"{_files.bank_name(bank)}.coreset"

    def put_in_place(self) -> list[dict[str, Any]]:
        """The files of a folder get their names. Returns their entries in the index."""
        paths = [self.folder / name for name in _files.free_names(self.folder, len(self.files))]
        # Read for their checksums while the fit can still go on, and renamed at once.
        entries = [
            {"file": path.name, "shape": [file.rows, file.width], "place": place, "sha256": file.digest()}
            for path, file, place in zip(paths, self.files, self.places, strict=True)
        ]
        for file in self.files:
            file.sync()
        for file, path in zip(self.files, paths, strict=True):
            cast("Path", file.path).replace(path)
        sync_folder(self.folder)
        return entries

    def close(self) -> None:
        for file in self.files:
            file.close()
        self._unlock()

    def _unlock(self) -> None:
        _files.unlock(self._lock)
        self._lock = None

    def stop(self) -> None:
        """After an error or an interruption: images that are done stay in the folder; without one nothing does."""
        with contextlib.suppress(OSError):  # of a full disk; what was told before holds
            if self.folder is not None and _files.Home.of(self.folder) != self._home:
                # It came when the detector was there already.
                (self.folder / UNFINISHED).unlink(missing_ok=True)
            elif self.folder is not None and self.done:
                self._tell()
            for file in self.files:
                file.close()
        if self.folder is not None and not self.done:
            for file in self.files:
                cast("Path", file.path).unlink(missing_ok=True)
            if self._is_new:
                with contextlib.suppress(OSError):  # it is no longer empty
                    self.folder.rmdir()
        self._unlock()

    def _go_on(self) -> None:
        told = unfinished(self.folder)
        if told["settings"] != self._settings:
            raise ValueError(
                f"{WHAT}: {self.folder} holds a fit that did not finish, with other settings: "
                f"{', '.join(_differing(told['settings'], self._settings))}; give the same, or start anew"
            )
        if len(told["rows"]) != len(self.places):
            raise ValueError(f"{WHAT}: {self.folder / UNFINISHED} is damaged: it has {len(told['rows'])} banks")
        dtype, width = _files.DTYPES[told["dtype"]], told["width"]
        self.files = []
        names = _files.free_names(self.folder, len(self.places))
        for i, rows in enumerate(told["rows"]):
            path = self.folder / f"{_files.bank_name(i)}.rows"
            if not path.exists() and (self.folder / names[i]).exists():
                (self.folder / names[i]).replace(path)  # it ended between the names of the rows and the index
            try:
                file = open_regular(self.folder, path.name, write=True)
            except (OSError, ValueError) as error:
                raise ValueError(f"{WHAT}: {path} is damaged or missing: {error}; start anew") from error
            if file.seek(0, 2) < _files.HEAD + rows * width * dtype.itemsize:
                raise ValueError(f"{WHAT}: {path} is shorter than {UNFINISHED} says; start anew")
            self.files.append(RowFile(file, rows, width, dtype, path))
        self._whole = _Whole(told["images"], told["seen"], told["rows"])


def unfinished(folder: Path) -> dict[str, Any]:
    """What a folder tells of the fit in it that did not finish."""
    path = folder / UNFINISHED
    try:
        told = read_json(folder, UNFINISHED)
        good = told["format"] == FORMAT and told["dtype"] in _files.DTYPES and isinstance(told["settings"], dict)
        good = good and told["images"] != 0
        numbers = (told["images"], told["width"], *told["rows"])
        if not good or not isinstance(told["seen"], str) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("it was not written by a fit")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{WHAT}: {path} is damaged: {error}; start anew") from error
    return told


def _differing(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """The settings that are not the same; the whole encoder only where it is nothing that has a name of its own."""
    names = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
    return [name for name in names if name != "encoder" or not set(names) & set(OF_ENCODER)]


def _chained(before: str, digest: str) -> str:
    """What tells images in their order from others, with one more."""
    return hashlib.sha256(f"{before} {digest}".encode()).hexdigest()


def _new(path: Path) -> RowFile:
    path.unlink(missing_ok=True)  # a link in the way is not written through
    return RowFile(path.open("x+b"), path=path)
