"""Score maps and masks as what they may be given: arrays, tensors, or paths of .npy files."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

_MISSING = object()


def pairs(what: str, scores: Iterable[Any], masks: Iterable[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One map after the other: its scores (H, W), and where its mask is not zero."""
    for name, x in (("scores", scores), ("masks", masks)):
        if isinstance(x, (str, os.PathLike)) or not hasattr(x, "__iter__"):
            raise TypeError(f"murf_fast.{what}: `{name}` must be several maps, such as a list, got {x!r}")
    given, n, m = False, 0, 0
    for s, mask in itertools.zip_longest(scores, masks, fillvalue=_MISSING):
        n, m = n + (s is not _MISSING), m + (mask is not _MISSING)
        if n == m:
            given = True
            yield pair(what, f"scores[{n - 1}]", s, f"masks[{n - 1}]", mask)
    if n != m or not given:
        raise ValueError(f"murf_fast.{what}: `scores` and `masks` must be as many, at least one, got {n} and {m}")


def pair(what: str, name: str, scores: object, mask_name: str, mask: object) -> tuple[np.ndarray, np.ndarray]:
    """One map's scores (H, W), checked, and where its mask is not zero."""
    scores, mask = _named(what, name, scores), _named(what, mask_name, mask)
    if mask.dtype.kind == "f" and np.isnan(mask).any():
        raise ValueError(f"murf_fast.{what}: `{mask_name}` has NaN, which is neither defect nor none")
    if scores.ndim != 2 or not np.issubdtype(scores.dtype, np.floating):
        raise TypeError(
            f"murf_fast.{what}: `{name}` must be a floating-point (H, W), got {scores.dtype} {scores.shape}"
        )
    if mask.shape != scores.shape:
        raise ValueError(
            f"murf_fast.{what}: `{mask_name}` must have the size of its map, {scores.shape}, got {mask.shape}"
        )
    finite = np.isfinite(scores)
    if not finite.all():
        raise ValueError(f"murf_fast.{what}: `{name}` has {(~finite).sum()} values that are not finite")
    return scores, mask != 0


def _named(what: str, name: str, x: object) -> np.ndarray:
    """An array; a file that holds none is named."""
    try:
        return array(x)
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, FileNotFoundError) or not isinstance(x, (str, os.PathLike)):
            raise
        raise ValueError(f"murf_fast.{what}: `{name}` must be a .npy file with an array, {x} is not") from error


def images(what: str, scores: Any, labels: Any) -> tuple[Any, Any]:
    """Scores of whole images (N,) and their labels as one map of one row; anything else as it is."""
    if not _is_row(scores):
        return scores, labels
    scores = _row(scores)
    if not _is_row(labels) or len(labels) != len(scores):
        got = f"{len(labels)}" if _is_row(labels) else type(labels).__name__
        raise ValueError(f"murf_fast.{what}: `masks` must have one label per score, {len(scores)}, got {got}")
    return [scores[None]], [_row(labels)[None]]


def array(x: Any) -> np.ndarray:
    """As an array in main memory, with at least float32's precision; files stay where they are."""
    if isinstance(x, (str, os.PathLike)):
        return np.load(x, mmap_mode="r", allow_pickle=False)
    if hasattr(x, "detach"):
        x = x.detach().resolve_neg()
        x = (x.float() if x.is_floating_point() and x.element_size() < 4 else x).cpu().numpy()
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype == np.float16 else x


def _row(values: object) -> np.ndarray:
    return np.stack([array(v) for v in values]) if isinstance(values, (list, tuple)) else array(values)


def _is_row(values: object) -> bool:
    """Whether ``values`` are numbers, not maps."""
    if isinstance(values, (list, tuple)):
        return bool(values) and all(not isinstance(v, (str, os.PathLike)) and np.ndim(v) == 0 for v in values)
    kind = getattr(getattr(values, "dtype", None), "kind", "f")  # a tensor's dtype has none
    return getattr(values, "ndim", None) == 1 and kind in "fiub"
