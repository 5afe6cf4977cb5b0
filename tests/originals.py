"""Inputs and outputs of the original implementations, and real weights, where this checkout has them.

Small golden files are in `tests/golden/`. The rest lies in a folder beside the checkout that is not part of the project
(`MURF_FAST_ORIGINALS` names another one); tests that need it skip, with the reason, where it is missing.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent / "golden"
ORIGINALS = Path(os.environ.get("MURF_FAST_ORIGINALS", Path(__file__).resolve().parents[2] / "shared"))


def golden(name: str) -> np.lib.npyio.NpzFile:
    """The arrays of golden file ``name`` (without its ending)."""
    for path in (HERE / f"{name}.npz", ORIGINALS / "golden" / f"{name}.npz"):
        if path.is_file():
            return np.load(path)
    pytest.skip(f"{name}.npz is too large for the repository, and not in {ORIGINALS / 'golden'} (MURF_FAST_ORIGINALS)")


def asset(name: str) -> Path:
    """The path of a file of real weights or images."""
    path = ORIGINALS / "assets" / name
    if not path.is_file():
        pytest.skip(f"{name} is not in {ORIGINALS / 'assets'} (MURF_FAST_ORIGINALS)")
    return path
