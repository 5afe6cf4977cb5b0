"""Banks on disk: rows appended to a file, saved as safetensors, mapped into memory again.

A detector is its index: banks get names that no index in the folder uses, and the new index takes the place of the old
one in a single step, when all that it names is on the disk. So a folder holds the old detector or the new one, whatever
ends the process or the machine.

A folder may come from anywhere: only regular files that lie in it are opened, links are not followed, and what its
index says is held against what the files hold.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import json
import mmap
import os
import struct
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from murf_fast._files import (
    BLOCK,
    LARGEST_JSON,
    open_regular,
    read_json,
    sha256_of,
    sha256_of_json,
    sync,
    sync_folder,
    write_json,
)

FORMAT = "murf_fast anomaly detector"
VERSION = 4  # 1 had no checksums, 2 enlarged every image to `pixels`, 3 knew no methods by name; they still load
INDEX = "detector.json"
UNFINISHED = "unfinished.json"
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
WHAT = "murf_fast.MultiResolutionDetector"
HEAD = 512  # bytes in front of rows whose number is not known yet


class RowFile:
    """Rows of one width that arrive piece by piece, behind room for the header of a safetensors file.

    Only the piece at hand is in memory. ``rows``, ``width`` and ``dtype`` are what the file holds already.
    """

    def __init__(
        self,
        file: BinaryIO,
        rows: int = 0,
        width: int = 0,
        dtype: torch.dtype = torch.float32,
        path: Path | None = None,
    ) -> None:
        self.path, self.rows, self.width, self.dtype, self._file = path, rows, width, dtype, file
        file.truncate(HEAD + rows * width * dtype.itemsize)
        file.seek(0, os.SEEK_END)

    def append(self, rows: Tensor) -> None:
        rows = rows.detach().cpu().contiguous()
        if self.rows and (rows.shape[1], rows.dtype) != (self.width, self.dtype):
            raise ValueError(
                f"{WHAT}: features of {self.dtype} with {self.width} columns, then of {rows.dtype} with {rows.shape[1]}"
            )
        self.width, self.dtype = rows.shape[1], rows.dtype
        self.rows += len(rows)
        if len(rows):
            self._file.write(rows.view(torch.uint8).numpy().data)

    def sync(self) -> None:
        """Returns when the rows are on the disk."""
        sync(self._file)

    def mapped(self, place: dict[str, str]) -> Tensor:
        """The rows, mapped, behind the header that they now have."""
        self._file.seek(0)
        self._file.write(_header(self.rows, self.width, self.dtype, place, HEAD))
        self._file.flush()
        if not self.rows:
            return torch.zeros(0, self.width, dtype=self.dtype, device="cpu")
        self._file.seek(0)
        return _mapped(self._file)[0]

    def digest(self) -> str:
        """The sha256 of the file, of which :meth:`mapped` wrote the header."""
        self._file.seek(0)
        return sha256_of(self._file)

    def close(self) -> None:
        self._file.close()


@dataclasses.dataclass(frozen=True)
class Home:
    """The folder of a detector, and the sha256 of its index, which tells it from every other."""

    folder: Path
    digest: str

    @classmethod
    def of(cls, folder: Path) -> Home:
        """An empty digest where there is no index that can be read."""
        try:
            with open_regular(folder, INDEX) as file:
                return cls(folder, sha256_of(file))
        except (OSError, ValueError):
            return cls(folder, "")

    def check(self) -> None:
        """Raises where another detector is in the folder by now."""
        if not self.digest or Home.of(self.folder) != self:
            raise ValueError(f"{WHAT}: {self.folder} holds another detector by now, or none; load() it again")


def write_banks(folder: Path, banks: list[Tensor], places: list[dict[str, str]]) -> list[dict[str, Any]]:
    """All banks of a folder, beside those of the detector that it holds. Returns their entries in an index."""
    entries = []
    for name, bank, place in zip(free_names(folder, len(banks)), banks, places, strict=True):
        digest = write_rows(folder / name, bank, place)
        entries.append({"file": name, "shape": list(bank.shape), "place": place, "sha256": digest})
    sync_folder(folder)
    return entries


def write_rows(path: Path, rows: Tensor, place: dict[str, str]) -> str:
    """A safetensors file with one tensor, ``rows``, written in pieces; in place when it is whole, and on the disk.

    ``place`` is kept with it and says which bank it is. Returns the file's sha256.
    """
    part, digest = path.with_name(f"{path.name}.part"), hashlib.sha256()
    part.unlink(missing_ok=True)
    with part.open("xb") as file:
        for piece in _pieces(_header(len(rows), rows.shape[1], rows.dtype, place), rows):
            digest.update(piece)
            file.write(piece)
        sync(file)
    os.replace(part, path)
    return digest.hexdigest()


def read_rows(folder: Path, name: str, checksum: str | None) -> tuple[Tensor, dict[str, str]]:
    """The rows of a file, mapped into memory, and their place. ``checksum`` is compared, unless None."""
    path = folder / name
    try:
        with open_regular(folder, name) as file:
            if checksum is not None:
                _compare(file, checksum)
            return _mapped(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{WHAT}: bank {path} is damaged or missing: {reason}") from error


def write_description(folder: Path, description: dict[str, Any]) -> None:
    content = {"format": FORMAT, "version": VERSION, **description}
    write_json(folder / INDEX, {**content, "sha256": sha256_of_json(content)})


def lock(folder: Path) -> int | None:
    """A descriptor that keeps others from writing detectors to a folder until it is closed; None: there is no such.

    Raises:
        ValueError: Another fit, addition or save writes to it, in whatever process.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return None
    entry = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(entry, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(entry)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise ValueError(f"{WHAT}: {folder} is written to by another fit, addition or save") from error
        return None  # file systems over a network may have no locks
    return entry


def unlock(entry: int | None) -> None:
    if entry is not None:
        os.close(entry)


def make_folder(folder: Path) -> None:
    """A folder and those above it, on the disk with their names."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def read_description(folder: Path) -> dict[str, Any]:
    """The index of a folder, with ``"intact"``: whether it is as it was written. Its entries are not looked at."""
    path = folder / INDEX
    try:
        description = read_json(folder, INDEX)
    except FileNotFoundError:
        if (folder / UNFINISHED).exists():
            raise ValueError(f"{WHAT}: {folder} holds a fit that did not finish, no detector yet") from None
        raise ValueError(f"{WHAT}: {folder} holds no detector: {INDEX} is missing") from None
    except NotADirectoryError:
        raise ValueError(f"{WHAT}: {folder} holds no detector: it is not a folder") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{WHAT}: {path} is damaged: {reason}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{WHAT}: {path} was not written by a detector")
    if type(description.get("version")) is not int or not 1 <= description["version"] <= VERSION:
        raise ValueError(f"{WHAT}: {path} has version {description.get('version')}, expected 1 to {VERSION}")
    if description["version"] == 1:
        warnings.warn(
            f"{path} has version 1, which has no checksums: damaged rows are not noticed; save() it again",
            stacklevel=3,
        )
    checksum = description.pop("sha256", None)
    return {**description, "intact": description["version"] == 1 or checksum == sha256_of_json(description)}


def folder_of(folder: object) -> Path:
    """The path of a folder, which need not exist yet."""
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"{WHAT}: `folder` must be a path, got {folder!r}")
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{WHAT}: `folder` is {path}, and it is not a folder")
    return path


def check_free(folder: Path, overwrite: bool, resume: bool = False) -> None:
    """Refuses to write a bank where one is, or where a fit did not finish, unless that is meant."""
    if (folder / INDEX).exists() and not overwrite:
        raise ValueError(f"{WHAT}: {folder} holds a detector; overwrite=True replaces it")
    check_finished(folder, overwrite, resume)


def check_finished(folder: Path, overwrite: bool, resume: bool) -> None:
    """Refuses to write banks where a fit or an addition did not finish, unless that is meant."""
    if (folder / UNFINISHED).exists() and not overwrite and not resume:
        what, call = ("an addition", "add") if (folder / INDEX).exists() else ("a fit", "fit")
        raise ValueError(
            f"{WHAT}: {folder} holds {what} that did not finish; {call}(resume=True) goes on with it, overwrite=True "
            "starts anew"
        )


def commit(folder: Path, description: dict[str, Any]) -> Home:
    """Makes banks that are in place a detector, and removes those of the one before."""
    write_description(folder, description)
    home = Home.of(folder)
    remove_leftovers(folder, [entry["file"] for entry in description["banks"]])
    return home


def remove_leftovers(folder: Path, names: list[str]) -> None:
    """After a bank was written: files of a larger one that it replaced, and what a fit left that did not finish."""
    (folder / UNFINISHED).unlink(missing_ok=True)
    for path in folder.glob("bank-*.safetensors*"):
        if path.name not in names and not path.is_dir():
            path.unlink()


def free_names(folder: Path, count: int) -> list[str]:
    """Names for banks that the index of a folder, if there is one, does not use."""
    try:
        used = {str(bank["file"]) for bank in read_json(folder, INDEX)["banks"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        used = set()  # none, or one that no detector is loaded by
    sets = ([bank_name(i, n) for i in range(count)] for n in itertools.count(1))
    return next(names for names in sets if used.isdisjoint(names))


def bank_name(i: int, n: int = 1) -> str:
    """That of bank ``i`` in the ``n``-th set of names."""
    return f"bank-{i:03d}.safetensors" if n == 1 else f"bank-{i:03d}-{n}.safetensors"


def _compare(file: BinaryIO, checksum: object) -> None:
    if sha256_of(file) != checksum:
        raise ValueError("its checksum is not that of the index")
    file.seek(0)


def _mapped(file: BinaryIO) -> tuple[Tensor, dict[str, str]]:
    """The one tensor of a safetensors file, of which every number is held against the file's length."""
    size = os.fstat(file.fileno()).st_size
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(size - 8, LARGEST_JSON):
        raise ValueError("its header is longer than the file")
    header = json.loads(file.read(length).decode())
    told, place = header["rows"], header.get("__metadata__", {})
    rows, width = told["shape"]
    dtype = DTYPES[told["dtype"]]
    if not (type(rows) is type(width) is int and rows >= 0 and width > 0):
        raise ValueError(f"its rows have shape {told['shape']}")
    count = rows * width * dtype.itemsize
    if told["data_offsets"] != [0, count] or size != 8 + length + count or set(header) - {"__metadata__", "rows"}:
        raise ValueError(f"it has {size} bytes, expected {8 + length + count} for one tensor of shape {told['shape']}")
    if not rows:
        return torch.zeros(0, width, dtype=dtype, device="cpu"), place
    # A private mapping, as torch.from_file makes it: pages are read when they are looked at.
    pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    return torch.frombuffer(pages, dtype=dtype, count=rows * width, offset=8 + length).view(rows, width), place


def _header(rows: int, width: int, dtype: torch.dtype, place: dict[str, str], length: int = 0) -> bytes:
    """The start of a safetensors file with one tensor ``rows``, of ``length`` bytes or as long as it must be."""
    offsets = [0, rows * width * dtype.itemsize]
    text = json.dumps(
        {
            "__metadata__": place,
            "rows": {"dtype": NAMES[dtype], "shape": [rows, width], "data_offsets": offsets},
        }
    ).encode()
    text = text.ljust(length - 8)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _pieces(head: bytes, rows: Tensor) -> Iterator[bytes | memoryview]:
    yield head
    for piece in rows.split(max(1, BLOCK // max(1, rows.shape[1] * rows.element_size()))):
        if len(piece):
            yield piece.contiguous().view(torch.uint8).numpy().data


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
