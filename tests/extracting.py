"""Small images, a small model and runs of `murf_fast.data.extraction`, for the tests of it."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from murf_fast.cli.extract.model import Recipe
from murf_fast.data import _records
from murf_fast.data.extraction import Machines, Progress, extract
from murf_fast.data.settings import Options
from murf_fast.data.sources import open_source

SIZES = ((28, 28), (42, 28))
CRASHES = b"CRASH"  # with what a file begins that takes the decoder down, by the patch below
WAITS = b"WAITS"  # before an image whose decoder waits for a file
PATCH = """
import sys
if any("_reader_process" in word for word in sys.orig_argv):
    import ctypes, io, os, time
    import PIL.Image

    opened = PIL.Image.open

    def patched(file):
        data = file.read()
        if data.startswith({crashes!r}):
            ctypes.string_at(0)
        if data.startswith({waits!r}):
            while not os.path.exists({gate!r}):
                time.sleep(0.01)
            data = data[len({waits!r}) :]
        return opened(io.BytesIO(data))

    PIL.Image.open = patched
"""


def make_images(folder: Path, count: int) -> list[np.ndarray]:
    """PNG files of several sizes; their pixels in the order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    found = []
    for i in range(count):
        pixels = generator.integers(0, 256, (20 + 7 * (i % 3), 31 + 5 * (i % 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
        found.append(pixels)
    return found


def make_tar(path: Path, files: list[Path]) -> None:
    with tarfile.open(path, "w") as archive:
        for file in files:
            archive.add(file, file.name)


def recipe(weights: Path, **options) -> Recipe:
    return Recipe(str(weights), **{"sizes": SIZES, **options})


def run(
    source, out, make, *, ray: bool = False, workers=None, strict=False, verify=False, step=None, readers=1, **options
):
    """One extraction of few images in a shard; returns its records."""
    machines = Machines(torch.device("cpu"), readers, ray, None, workers, 1)
    progress = Progress(step=step or (lambda _: None))
    options = Options(**{"batch": 2, "shard": 3, **options})
    how = {"strict": strict, "verify": verify, "progress": progress}
    return extract(open_source(str(source)), Path(out), make, options, machines, **how)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path, but for the lock."""
    files = (p for p in Path(folder).rglob("*") if p.is_file() and p.name != _records.LOCK)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def put_patched_decoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """From here on a file that begins with `CRASHES` is a segmentation fault of the process that decodes it, and one
    behind `WAITS` takes until the file is there that is returned.
    """
    patch, gate = folder / "patched_decoder", folder / "gate"
    patch.mkdir()
    text = PATCH.format(crashes=CRASHES, waits=WAITS, gate=str(gate))
    (patch / "sitecustomize.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{patch}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return gate
