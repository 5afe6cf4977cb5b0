"""Which files are images, those of a folder, and paths as text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm", ".pnm")


def images_below(folder: Path) -> tuple[list[Path], int]:
    """The images of a folder and its subfolders, sorted, and how many other files it has.

    Hidden files are no images, nor is what has another suffix. Raises an OSError where a folder cannot be read.
    """
    inside = sorted(_files_below(folder))
    images = [p for p in inside if p.suffix.lower() in SUFFIXES and not _is_hidden(p.relative_to(folder))]
    return images, len(inside) - len(images)


def shown(path: object) -> str:
    """A path or a message as text that every terminal prints: bytes of a name that are no text are escaped."""
    return str(path).encode(errors="surrogateescape").decode(errors="backslashreplace")


def _files_below(folder: Path) -> Iterator[Path]:
    """Files of a folder and of those in it, links to folders too, each folder once; raises where one cannot be read."""

    def stop(error: OSError) -> None:
        raise error

    seen = set()
    for inside, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        here = os.stat(inside)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        yield from (Path(inside) / name for name in files)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
