"""The operations that random cases are drawn for."""

from __future__ import annotations

from collections.abc import Callable

import torch

import fuzz
from fuzz.compare import Comparison
from fuzz.draw import Draw
from murf_fast._discovery import exports

# What the files cases_*.py list in their `__all__`.
CASES: dict[str, Callable[[Draw], list[Comparison]]] = exports("fuzz", fuzz.__path__)


def comparisons(draw: Draw, op: str) -> list[Comparison]:
    """The comparisons of a case, with as many threads as it draws."""
    threads = torch.get_num_threads()
    torch.set_num_threads(draw.choice("threads", (1, 3), (5, 1)))
    try:
        return CASES[op](draw)
    finally:
        torch.set_num_threads(threads)


def failure_of(draw: Draw, op: str) -> str | None:
    """What is wrong with a case, and how to repeat it; None if nothing is."""
    try:
        failures = [text for check in comparisons(draw, op) if (text := check.failure())]
    except Exception as error:
        failures = [f"{type(error).__name__}: {error}"]
    return f"{'; '.join(failures)}\n    {draw.statement()}" if failures else None
