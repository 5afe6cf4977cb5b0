"""Loads the C++ extension, once. Nothing else of this package is imported here, so that everything may import this."""

from __future__ import annotations

import functools
import importlib
from typing import Any


@functools.cache
def _load() -> Any:
    try:
        return importlib.import_module("murf_fast._native"), None
    except ImportError as error:
        return None, str(error)


@functools.cache
def module() -> Any:
    """The extension; raises ImportError with the reason when it is missing."""
    extension, error = _load()
    if extension is None:
        raise ImportError(f"murf_fast: the C++ extension is missing: {error}")
    return extension


def load_error() -> str | None:
    return _load()[1]


def current_level() -> str:
    """Instruction-set level in use: the best one, or the one that MURF_FAST_CPU names."""
    return module().current_level()


def available_levels() -> list[str]:
    return module().available_levels()
