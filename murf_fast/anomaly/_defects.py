"""The scores of defect pixels, and which region of which image each belongs to."""

from __future__ import annotations

from typing import Any

import numpy as np

from murf_fast.anomaly._background import Ranks
from murf_fast.anomaly._curve import Curve


class Defects:
    """Gathers the defect pixels of many maps: a score and the number of a region for each.

    ``what`` is the caller's name for errors. ``regions`` asks for the 8-connected ones, by scipy.
    """

    def __init__(self, what: str, regions: bool):
        self._what = what
        self._label = _labelling(what) if regions else None
        self._scores: list[np.ndarray] = []
        self._regions: list[np.ndarray] = []
        self._sizes: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
        self._found = 0
        self._least, self._most = np.inf, -np.inf
        self._others = 0
        self._index: np.ndarray | Any = None

    def add(self, scores: np.ndarray, defect: np.ndarray) -> None:
        """``scores`` (H, W), finite; ``defect`` (H, W), bool."""
        self._least = min(self._least, scores.min(initial=np.inf))
        self._most = max(self._most, scores.max(initial=-np.inf))
        inside = scores[defect]
        self._others += scores.size - inside.size
        if not inside.size:
            return
        self._scores.append(inside)
        if self._label is not None:
            labels, count = self._label(defect, structure=np.ones((3, 3), dtype=bool))
            labels = labels[defect]
            self._sizes.append(np.bincount(labels, minlength=count + 1)[1:])
            self._regions.append(labels + np.int32(self._found - 1))
            self._found += count

    def ranks(self) -> Ranks:
        """For the other pixels to be counted among the scores. Raises ``ValueError`` where there is nothing to rank."""
        if not self._scores:
            raise ValueError(f"murf_fast.{self._what}: `masks` have no defect pixel")
        if not self._others:
            raise ValueError(f"murf_fast.{self._what}: `masks` have no pixel without defect")
        if self._least == self._most:
            raise ValueError(f"murf_fast.{self._what}: `scores` are all equal, {self._least}: there is nothing to rank")
        levels, self._index = np.unique(np.concatenate(self._scores), return_inverse=True)
        return Ranks(levels)

    def curve(self, ranks: Ranks) -> Curve:
        """With what :meth:`ranks` gave, after the other pixels were counted."""
        if ranks.total != self._others:
            raise ValueError(
                f"murf_fast.{self._what}: `scores` and `masks` must give the same pixels each time they are iterated,"
                f" got {self._others} without defect, then {ranks.total}"
            )
        levels, overlap = ranks.levels[::-1], None
        hits = np.cumsum(np.bincount(self._index)[::-1])
        if self._label is not None:
            shares = (1.0 / np.concatenate(self._sizes))[np.concatenate(self._regions)]
            gains = np.bincount(self._index, weights=shares)
            overlap = np.minimum(np.cumsum(gains[::-1]) / gains.sum(), 1.0)
        return Curve(levels, hits, overlap, ranks.above[::-1], ranks.at_least[::-1], ranks.total)


def _labelling(what: str) -> Any:
    try:
        from scipy import ndimage
    except ModuleNotFoundError as error:
        message = f"murf_fast.{what} needs scipy: pip install 'murf-fast[anomaly]'"
        raise ModuleNotFoundError(message, name="scipy") from error
    return ndimage.label
