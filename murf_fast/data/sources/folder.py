"""The images of a folder and its subfolders, in the order of their paths."""

from __future__ import annotations

from pathlib import Path

from murf_fast._image_paths import images_below, shown
from murf_fast.data.sources.item import FILE, Item, Source


def source(folder: Path) -> Source:
    images, others = images_below(folder)
    named = [(shown(path.relative_to(folder).as_posix()), path) for path in images]
    return Source([Item(name, FILE, str(path), 0, path.stat().st_size) for name, path in named], others)
