"""Files of image scores, and of maps."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

MAP_TYPES = ("npy", "tiff")
SUFFIXES = (".csv", ".json")


@dataclasses.dataclass(frozen=True)
class Row:
    """What is written of an image. ``is_defect``: its score is at the threshold or above; None without a threshold.

    ``label``: whether it is defective by the name of its folder; None where images are not labelled.
    """

    image: str
    score: float
    highest: float
    height: int
    width: int
    is_defect: bool | None
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
                part = path.with_name(f"{path.name}.part")
                part.write_text("")
                self._json.append((part, path))
                continue
            # Names that are no text are written as the bytes that they are.
            file = path.open("w", newline="", encoding="utf-8", errors="surrogateescape")
            table = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
            table.writeheader()
            self._tables.append((file, table))

    def add(self, row: Row) -> None:
        self.rows.append(row)
        for file, table in self._tables:
            table.writerow({name: int(v) if isinstance(v, bool) else v for name, v in dataclasses.asdict(row).items()})
            file.flush()

    def finish(self, about: dict, skipped: dict[Path, str]) -> None:
        for file, _ in self._tables:
            file.close()
        images = [dataclasses.asdict(row) for row in self.rows]
        content = {**about, "images": images, "skipped": {str(path): reason for path, reason in skipped.items()}}
        for part, path in self._json:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            os.replace(part, path)

    def __enter__(self) -> ScoreFiles:
        return self

    def __exit__(self, kind, *_: object) -> None:
        for file, _table in self._tables:
            file.close()
        for part, _path in self._json:
            with contextlib.suppress(FileNotFoundError):
                part.unlink()


def write_map(heat: np.ndarray, name: Path, kind: str) -> None:
    """Raw scores (H, W) in float32, as NumPy's file or as a TIFF of one channel."""
    path = name.with_name(f"{name.name}.{kind}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "npy":
        np.save(path, heat)
    else:
        Image.fromarray(heat).save(path, compression="tiff_deflate")
