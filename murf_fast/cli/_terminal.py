"""What the commands share: lists of numbers as options, one line for what users can put right, the console."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
import typer
from rich.console import Console

from murf_fast.backends import BackendUnavailableError

# Whoever writes 50 means half: percents are no scales.
LARGEST_SCALE = 10
# A side of fewer pixels is no image that is meant: a ratio or megapixels are.
SMALLEST_SIDE = 32
# Libraries that come with an extra of their own, whatever the command.
EXTRAS = {"timm": "timm", "zarr": "data", "pyarrow": "data", "ray": "ray", "pandas": "ray"}


def numbers(text: str, kind: type, option: str) -> list[Any]:
    numbers = parsed(text, kind)
    if not numbers or (kind is float and not all(0 < n <= LARGEST_SCALE for n in numbers)):
        expected = "numbers such as 7,9,11" if kind is int else f"numbers such as 0.3,0.5, up to {LARGEST_SCALE}"
        raise typer.BadParameter(f"expected {expected}, got {text!r}", param_hint=option)
    return numbers


def check_pixels(pixels: float | None, option: str) -> None:
    """Refuses what is no number of pixels or can only be a share or megapixels; 0 and None stand for something else."""
    if pixels is not None and pixels != 0 and not SMALLEST_SIDE**2 <= pixels < math.inf:
        raise typer.BadParameter(
            f"is a number of pixels, such as 5e6 for five megapixels, and at least {SMALLEST_SIDE**2}, got {pixels:g}",
            param_hint=option,
        )


def parsed(text: str, kind: type) -> list[Any]:
    """The numbers of a list; none where a part is no finite number."""
    try:
        numbers = [kind(part) for part in text.replace(",", " ").split()]
    except ValueError:
        return []
    return numbers if kind is int or all(map(math.isfinite, numbers)) else []


@contextlib.contextmanager
def one_line(extras: str) -> Iterator[None]:
    """What users can put right is one line, not a traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        needed = str(error.name).partition(".")[0]
        _fail(f"this needs {needed}: pip install 'murf-fast[{EXTRAS.get(needed, extras)}]'", 1)
    except (OSError, ValueError, BackendUnavailableError) as error:
        # The class that a message of the library begins with is no word of a command.
        _fail(re.sub(r"^murf_fast(\.\w+)+: ", "", str(error)))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _fail("not enough memory for images and scales of this size")


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _fail(message: str, code: int = 2) -> None:
    typer.echo(f"murf-fast: {message}", err=True)
    raise typer.Exit(code)


def console(*, stderr: bool = False) -> Console:
    """Rich's console; where the output is no terminal, wide enough for every table."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(width=120, stderr=stderr)
