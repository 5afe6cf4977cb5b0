"""The images of tar files as webdataset packs them, in the order in which they lie there.

Only headers are read; the bytes of an image are then read from where they lie, so that shards need no order.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from murf_fast._image_paths import SUFFIXES, shown
from murf_fast.data.sources.item import TAR, Item, Source


def source(files: Sequence[Path]) -> Source:
    """Raises an OSError or a ValueError that names the tar file which cannot be read, or is compressed."""
    items, others = [], 0
    for file in files:
        for member in _members(file):
            path = PurePosixPath(member.name)
            if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
                others += 1
                continue
            name = f"{shown(file.name)}/{shown(member.name)}"
            items.append(Item(name, TAR, str(file), member.offset_data, member.size))
    return Source(items, others, told=[(file.name, file.stat().st_size) for file in files])


def _members(file: Path) -> list[tarfile.TarInfo]:
    try:
        with tarfile.open(file, "r:") as archive:
            members = [m for m in archive if m.isreg()]
            sparse = next((m.name for m in members if m.issparse()), None)
            if sparse is not None:
                raise ValueError(f"{file} holds the sparse file {shown(sparse)}")
    except tarfile.TarError as error:
        raise ValueError(f"SOURCE {file} is no whole, uncompressed tar file: {error}") from error
    end = file.stat().st_size
    cut = next((m.name for m in members if m.offset_data + m.size > end), None)
    if cut is not None:
        raise ValueError(f"SOURCE {file} is cut within {shown(cut)}")
    return members
