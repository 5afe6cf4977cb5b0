"""The coreset of a bank while it is chosen: what a later process goes on from.

A file holds the rows chosen so far and every row's squared distance to the nearest of those it has met. It is written
whole or not at all, and says what it is of: a selection of anything else begins anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from murf_fast._files import open_regular, sync
from murf_fast.anomaly import _files

SECONDS = 10.0  # of work that the end of a process may cost


class Selection:
    """``chosen`` (count,) int64, -1 where a row is not chosen yet, and ``nearest`` (rows,) float64, as
    :func:`k_center_greedy` updates them.

    Args:
        path: The file, which is read if it is there; None: nothing is kept.
        of: What decides about the selection, as JSON has it.

    Raises:
        ValueError: The file is damaged.
    """

    def __init__(self, path: Path | None, of: dict[str, Any], rows: int, count: int) -> None:
        self._path: Path | Any = path  # None: nothing is kept
        self._of, self._told = json.dumps(of, sort_keys=True), time.monotonic()
        self.chosen = torch.full((count,), -1, dtype=torch.int64, device="cpu")
        self.nearest = torch.full((rows,), torch.inf, dtype=torch.float64, device="cpu")
        if path is not None and path.exists():
            self._read()

    @property
    def start(self) -> Tensor | int:
        """For :func:`k_center_greedy`."""
        done = self.chosen[self.chosen >= 0]
        return done if len(done) else 0

    @property
    def done(self) -> int:
        return int((self.chosen >= 0).sum())

    @property
    def is_due(self) -> bool:
        """Whether the file was written long ago."""
        return time.monotonic() > self._told + SECONDS

    def tell(self) -> None:
        """Writes the file if that was long ago."""
        if self.is_due:
            self.save()

    def save(self) -> None:
        if self._path is None:
            return
        part = self._path.with_name(f"{self._path.name}.part")
        part.unlink(missing_ok=True)  # a link in the way is not written through
        whole = self.done == len(self.chosen)
        nearest = self.nearest[:0] if whole else self.nearest
        with part.open("xb") as file:
            np.savez(file, of=np.array(self._of), chosen=self.chosen.numpy(), nearest=nearest.numpy())
            sync(file)
        os.replace(part, self._path)
        self._told = time.monotonic()

    def stop(self) -> None:
        """After an error or an interruption."""
        with contextlib.suppress(OSError):  # of a full disk; what was told before holds
            self.save()

    def _read(self) -> None:
        try:
            with open_regular(self._path.parent, self._path.name) as file, np.load(file) as content:
                of, chosen, nearest = str(content["of"]), content["chosen"], content["nearest"]
            whole = chosen.size > 0 and chosen.min() >= 0
            rows = 0 if whole else len(self.nearest)
            if of != self._of:
                return
            found = (chosen.shape, chosen.dtype, nearest.shape, nearest.dtype)
            if found != ((len(self.chosen),), np.int64, (rows,), np.float64):
                raise ValueError(f"it holds {found}")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{_files.WHAT}: {self._path} is damaged: {error}; start anew") from error
        self.chosen.copy_(torch.from_numpy(chosen))
        if rows:
            self.nearest.copy_(torch.from_numpy(nearest))
