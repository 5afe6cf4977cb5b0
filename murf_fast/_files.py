"""Files of folders that may come from anywhere: only regular files that lie in them are opened, no link is followed.

What is written is in place when it is whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import IO, Any, BinaryIO

BLOCK = 1 << 22
LARGEST_JSON = 1 << 24  # bytes of an index or a header
PART = ".part"  # how the name of a file ends that is not whole


def is_name(name: object) -> bool:
    """Whether it names a file of a folder, wherever the folder lies."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        return False
    return not PureWindowsPath(name).drive


def open_regular(folder: Path, name: str, *, write: bool = False) -> BinaryIO:
    """A regular file that lies in the folder; nothing else is opened, no link followed. ``write``: for both ways."""
    path = folder / name
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("it is not a regular file")
    # The flags say the same again, should it be another file by now.
    flags = (
        (os.O_RDWR if write else os.O_RDONLY)
        | getattr(os, "O_NOFOLLOW", 0)
        | getattr(os, "O_NONBLOCK", 0)
        | getattr(os, "O_BINARY", 0)
    )
    file = os.fdopen(os.open(path, flags | getattr(os, "O_CLOEXEC", 0)), "r+b" if write else "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("it is not a regular file")
    return file


def write_json(path: Path, content: object) -> None:
    """In place when it is whole, and on the disk with its name."""
    part = path.with_name(f"{path.name}{PART}")
    part.unlink(missing_ok=True)
    with part.open("x") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        sync(file)
    os.replace(part, path)
    sync_folder(path.parent)


def sync(file: IO[Any]) -> None:
    """Returns when what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Returns when the names in a folder are on the disk. Windows writes them by itself."""
    if os.name == "nt":
        return
    entry = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(entry)
    except OSError as error:  # file systems over a network may have no such call
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(entry)


def write_whole(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, object]:
    """Puts the bytes of ``pieces`` in place of ``path`` when all are on the disk; returns their ``sha256`` and number.

    Several processes may do so at once, each under a name of its own until then; after an error none of it is left.
    """
    part, digest, count = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PART}"), hashlib.sha256(), 0
    try:
        with part.open("xb") as file:
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
                count += len(piece)
            sync(file)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    return {"sha256": digest.hexdigest(), "bytes": count}


def read_json(folder: Path, name: str) -> Any:
    with open_regular(folder, name) as file:
        text = file.read(LARGEST_JSON + 1)
    if len(text) > LARGEST_JSON:
        raise ValueError("it is too long")
    return json.loads(text.decode())


def sha256_of(file: Any) -> str:
    """The sha256 from where the file stands to its end."""
    found, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
    while count := file.readinto(block):
        found.update(block[:count])
    return found.hexdigest()


def sha256_of_json(content: object) -> str:
    """The sha256 of what JSON says of it, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
