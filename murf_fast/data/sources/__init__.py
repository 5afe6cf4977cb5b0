"""Where images come from: a folder, a list of files, a set of tar files, a table of encoded images.

A source is a list of items, made before any work and the same in every run: which image is in which shard follows from
it alone.
"""

from __future__ import annotations

import re
from pathlib import Path

from murf_fast.data.sources import folder, listed, parquet, tar
from murf_fast.data.sources.item import Source

LISTS = (".txt", ".lst")
NUMBERED = re.compile(r"\{(\d+)\.\.(\d+)\}")  # as webdataset writes a set: part-{000..127}.tar
MOST_NUMBERED = 1_000_000


def open_source(given: str, column: str | None = None) -> Source:
    """The images of a folder, a list (.txt), a .tar or .parquet, or several of these by a pattern.

    Args:
        given: A path, or a pattern of files with ``*``, ``?``, ``[...]`` or ``{000..127}`` in its last part.
        column: Which column of a table holds the images.

    Raises:
        ModuleNotFoundError: A table is to be read, and pyarrow is not installed.
        OSError, ValueError: It is not there, is none of these, or holds no image; the message names it.
    """
    path = Path(given)
    if path.is_dir():
        files = [p for suffix in (".tar", ".parquet") for p in sorted(path.glob(f"*{suffix}")) if p.name[0] != "."]
        if not files:
            return _checked(given, folder.source(path), column)
    else:
        files = _matching(given, path)
    suffixes = {p.suffix.lower() for p in files}
    if len(suffixes) != 1:
        raise ValueError(f"SOURCE {given} holds files of several kinds ({', '.join(sorted(suffixes))}); give a pattern")
    suffix = suffixes.pop()
    if suffix == ".tar":
        return _checked(given, tar.source(files), column)
    if suffix == ".parquet":
        return _checked(given, parquet.source(files, column))
    if suffix in LISTS and len(files) == 1:
        return _checked(given, listed.source(files[0]), column)
    raise ValueError(f"SOURCE must be a folder, a list {' or '.join(LISTS)}, .tar or .parquet, got {given}")


def _matching(given: str, path: Path) -> list[Path]:
    """The files of a pattern, sorted; or the one that there is."""
    if path.exists():
        return [path]
    numbered = NUMBERED.search(path.name)
    if numbered:
        first, last = numbered.groups()
        if not 0 <= int(last) - int(first) < MOST_NUMBERED:
            raise ValueError(f"SOURCE {given} must count upwards, to at most {MOST_NUMBERED:,} files")
        names = [
            f"{path.name[: numbered.start()]}{i:0{len(first)}}{path.name[numbered.end() :]}"
            for i in range(int(first), int(last) + 1)
        ]
        files = [path.with_name(name) for name in names]
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None:
            raise FileNotFoundError(f"SOURCE {given}: {missing} is not there")
        return files
    files = sorted(p for p in path.parent.glob(path.name)) if any(c in path.name for c in "*?[") else []
    if not files:
        raise FileNotFoundError(f"SOURCE {given} is not there")
    return files


def _checked(given: str, source: Source, column: str | None = None) -> Source:
    if column is not None:
        raise ValueError(f"--column names a column of .parquet files, SOURCE is {given}")
    if not source.items:
        raise ValueError(f"SOURCE {given} holds no image")
    seen: set[str] = set()
    for item in source.items:
        if item.name in seen:
            raise ValueError(f"SOURCE {given} has two images of the name {item.name}")
        seen.add(item.name)
    return source
