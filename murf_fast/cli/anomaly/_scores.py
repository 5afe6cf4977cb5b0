"""Files of image scores, and of maps."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

MAP_TYPES = ("npy", "tiff")
SUFFIXES = (".csv", ".json")


@dataclasses.dataclass(frozen=True)
class Row:
    """What is written of an image. ``verdict``: "fail" where its score is at the threshold or above, else "pass"; None
    without a threshold.

    ``label``: whether it is defective by the name of its folder; None where images are not labelled.
    """

    image: str
    score: float
    highest: float
    height: int
    width: int
    verdict: str | None
    label: bool | None


class ScoreFiles:
    """CSV, of which every row is on disk as soon as its image is scored, and JSON, when all are.

    All files are tried for writing before the first image. ``paths`` end in ``SUFFIXES``.

    Raises:
        OSError: A file cannot be written.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.rows: list[Row] = []
        self._tables, self._json = [], []
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix.lower() == ".json":
                part = _part(path)
                part.write_text("")
                self._json.append((part, path))
                continue
            self._tables.append((*_table(path), path))

    def add(self, row: Row) -> None:
        self.rows.append(row)
        for file, table, _ in self._tables:
            _write(table, row)
            file.flush()

    def judge(self, verdict: Callable[[float], str | None]) -> None:
        """Replaces the verdicts of all rows, where these are known last."""
        self.rows = [dataclasses.replace(row, verdict=verdict(row.score)) for row in self.rows]
        tables, self._tables = self._tables, []
        for old, _, path in tables:
            old.close()
            file, table = _table(_part(path))
            for row in self.rows:
                _write(table, row)
            file.close()
            os.replace(_part(path), path)

    def finish(self, about: dict[str, Any], skipped: dict[Path, str]) -> None:
        for file, *_ in self._tables:
            file.close()
        images = [dataclasses.asdict(row) for row in self.rows]
        content = {**about, "images": images, "skipped": {str(path): reason for path, reason in skipped.items()}}
        for part, path in self._json:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            os.replace(part, path)

    def __enter__(self) -> ScoreFiles:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        for file, *_ in self._tables:
            file.close()
        for part, _path in self._json:
            with contextlib.suppress(FileNotFoundError):
                part.unlink()


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _table(path: Path) -> tuple[TextIO, csv.DictWriter[str]]:
    # Names that are no text are written as the bytes that they are.
    file = path.open("w", newline="", encoding="utf-8", errors="surrogateescape")
    table = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
    table.writeheader()
    return file, table


def _write(table: csv.DictWriter[str], row: Row) -> None:
    table.writerow({name: int(v) if isinstance(v, bool) else v for name, v in dataclasses.asdict(row).items()})


def write_map(heat: np.ndarray, name: Path, kind: str) -> None:
    """Raw scores (H, W) in float32, as NumPy's file or as a TIFF of one channel."""
    path = name.with_name(f"{name.name}.{kind}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "npy":
        np.save(path, heat)
    else:
        Image.fromarray(heat).save(path, compression="tiff_deflate")
