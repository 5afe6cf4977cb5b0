"""Arguments of fits and loads, checked before any work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from murf_fast import _arguments
from murf_fast.anomaly import _images
from murf_fast.anomaly._patches import WHAT
from murf_fast.anomaly.ray_workers import RayWorkers


def share(name: str, value: object) -> float:
    """A part of a whole, which is not nothing."""
    found = _arguments.number(WHAT, name, value)
    if not 0 < found <= 1:
        raise ValueError(f"murf_fast.{WHAT}: `{name}` must be in (0, 1], got {found!r}")
    return found


def several(images: object, held_out: object, batch: object, **functions: object) -> Iterable[Any]:
    """The images of a fit, with its other arguments checked."""
    _arguments.integer(WHAT, "held_out", held_out, 0)
    if batch is not None:
        _arguments.integer(WHAT, "batch", batch, 1)
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"murf_fast.{WHAT}: `{name}` must be callable, got {type(function).__name__}")
    return _images.many(images)


def is_cluster(cluster: object) -> bool:
    """Whether there is one; a TypeError where it is none."""
    if cluster is not None and not isinstance(cluster, RayWorkers):
        raise TypeError(f"murf_fast.{WHAT}: `cluster` must be RayWorkers or None, got {type(cluster).__name__}")
    return cluster is not None
