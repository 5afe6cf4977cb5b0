"""The images that a text file names, one a line, in its order; paths are from where the list lies."""

from __future__ import annotations

from pathlib import Path

from murf_fast._image_paths import shown
from murf_fast.data.sources.item import FILE, Item, Source


def source(file: Path) -> Source:
    """Raises an OSError or a ValueError, which names the line, where a file is not there."""
    items = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), 1):
        if not line.strip():
            continue
        path = file.parent / line.strip()
        if not path.is_file():
            raise FileNotFoundError(f"SOURCE {file}, line {number}: {shown(path)} is not a file")
        items.append(Item(shown(line.strip()), FILE, str(path), 0, path.stat().st_size))
    return Source(items)
