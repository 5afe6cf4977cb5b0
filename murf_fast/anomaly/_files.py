"""Banks on disk: rows appended to a file, saved as safetensors and mapped into memory again."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import torch
from torch import Tensor

FORMAT = "murf_fast anomaly detector"
VERSION = 1
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class RowFile:
    """Rows of one width that arrive piece by piece. Only the piece at hand is in memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.width, self.dtype = path, 0, 0, torch.float32
        path.unlink(missing_ok=True)  # an older bank may still be mapped
        self._file = path.open("wb")

    def append(self, rows: Tensor) -> None:
        rows = rows.detach().cpu().contiguous()
        if self.rows and (rows.shape[1], rows.dtype) != (self.width, self.dtype):
            raise ValueError(
                f"murf_fast.MultiResolutionDetector: features of {self.dtype} with {self.width} columns, then of "
                f"{rows.dtype} with {rows.shape[1]}"
            )
        self.width, self.dtype = rows.shape[1], rows.dtype
        self.rows += len(rows)
        self._file.write(rows.view(torch.uint8).numpy().data)

    def tensor(self) -> Tensor:
        """The rows, mapped."""
        self._file.close()
        if not self.rows:
            raise ValueError("murf_fast.MultiResolutionDetector: `images` gave no feature for a bank")
        shared = torch.from_file(str(self.path), shared=False, size=self.rows * self.width, dtype=self.dtype)
        return shared.view(self.rows, self.width)


def write_rows(path: Path, rows: Tensor) -> None:
    """A safetensors file with one tensor, ``rows``, written in pieces and put in place when it is whole."""
    header = {"rows": {"dtype": NAMES[rows.dtype], "shape": list(rows.shape), "data_offsets": [0, rows.nbytes]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for piece in rows.split(max(1, (64 << 20) // max(1, rows.shape[1] * rows.element_size()))):
            file.write(piece.contiguous().view(torch.uint8).numpy().data)
    os.replace(part, path)


def read_rows(path: Path) -> Tensor:
    """The rows of a file, mapped into memory."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("rows")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"murf_fast.MultiResolutionDetector: bank {path} is damaged or missing: {error}") from error


def write_description(folder: Path, description: dict) -> None:
    part = folder / "detector.json.part"
    part.write_text(json.dumps({"format": FORMAT, "version": VERSION, **description}, indent=2) + "\n")
    os.replace(part, folder / "detector.json")


def read_description(folder: Path) -> dict:
    path = folder / "detector.json"
    try:
        description = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"murf_fast.MultiResolutionDetector: {folder} holds no detector: detector.json is missing"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"murf_fast.MultiResolutionDetector: {path} is damaged: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"murf_fast.MultiResolutionDetector: {path} was not written by a detector")
    if description.get("version") != VERSION:
        raise ValueError(
            f"murf_fast.MultiResolutionDetector: {path} has version {description.get('version')}, expected {VERSION}"
        )
    return description
