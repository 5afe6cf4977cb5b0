"""Banks on disk: rows appended to a file, saved as safetensors, mapped into memory again.

A folder may come from anywhere: only regular files that lie in it are opened, links are not followed, and what its
index says is held against what the files hold.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from murf_fast._files import BLOCK, LARGEST_JSON, open_regular, read_json, sha256_of, sha256_of_json, write_json

FORMAT = "murf_fast anomaly detector"
VERSION = 3  # 1 had no checksums, 2 enlarged every image to `pixels`; they still load
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

    def flush(self) -> None:
        self._file.flush()

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


def write_banks(folder: Path, banks: list[Tensor], places: list[dict[str, str]]) -> list[dict]:
    """All banks of a folder, put in place when all are whole. Returns their entries in the index."""
    entries = []
    for i, (bank, place) in enumerate(zip(banks, places, strict=True)):
        digest = write_rows(folder / f"{bank_name(i)}.whole", bank, place)
        entries.append({"file": bank_name(i), "shape": list(bank.shape), "place": place, "sha256": digest})
    (folder / INDEX).unlink(missing_ok=True)  # what it names is replaced from here on
    for entry in entries:
        os.replace(folder / f"{entry['file']}.whole", folder / entry["file"])
    return entries


def write_rows(path: Path, rows: Tensor, place: dict[str, str]) -> str:
    """A safetensors file with one tensor, ``rows``, written in pieces and put in place when it is whole.

    ``place`` is kept with it and says which bank it is. Returns the file's sha256.
    """
    part, digest = path.with_suffix(".part"), hashlib.sha256()
    part.unlink(missing_ok=True)
    with part.open("xb") as file:
        for piece in _pieces(_header(len(rows), rows.shape[1], rows.dtype, place), rows):
            digest.update(piece)
            file.write(piece)
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


def write_description(folder: Path, description: dict) -> None:
    content = {"format": FORMAT, "version": VERSION, **description}
    write_json(folder / INDEX, {**content, "sha256": sha256_of_json(content)})


def read_description(folder: Path) -> dict:
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
    if overwrite:
        return
    if (folder / INDEX).exists():
        raise ValueError(f"{WHAT}: {folder} holds a detector; overwrite=True replaces it")
    if (folder / UNFINISHED).exists() and not resume:
        raise ValueError(
            f"{WHAT}: {folder} holds a fit that did not finish; fit(resume=True) goes on with it, overwrite=True "
            "starts anew"
        )


def remove_leftovers(folder: Path, names: list[str]) -> None:
    """After a bank was written: files of a larger one that it replaced, and what a fit left that did not finish."""
    (folder / UNFINISHED).unlink(missing_ok=True)
    for path in folder.glob("bank-*.safetensors*"):
        if path.name not in names and not path.is_dir():
            path.unlink()


def bank_name(i: int) -> str:
    return f"bank-{i:03d}.safetensors"


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


def is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
