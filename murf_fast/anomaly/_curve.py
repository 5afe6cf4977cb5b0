"""From the ranks of defect pixels among the others to the measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np


@dataclass(frozen=True)
class Curve:
    """What is at or above every score of a defect pixel, from the highest (L,).

    Only those scores can move the overlap, or be the best threshold; other pixels count where they lie between them.
    """

    levels: np.ndarray  # the scores, falling, each once
    hits: np.ndarray  # defect pixels at or above
    overlap: np.ndarray | None  # mean share of the regions at or above; None without regions
    above: np.ndarray  # other pixels above
    at_least: np.ndarray  # other pixels at or above
    background: int  # other pixels in all

    def au_pro(self, limit: float) -> float:
        return self._area(cast("np.ndarray", self.overlap), limit)

    def au_roc(self, limit: float) -> float:
        return self._area(self.hits / self.hits[-1], limit)

    def best_f1(self) -> tuple[float, float]:
        f1 = 2 * self.hits / (self.hits + self.at_least + self.hits[-1])
        best = int(np.argmax(f1))
        return float(f1[best]), float(self.levels[best])

    def _area(self, overlap: np.ndarray, limit: float) -> float:
        """The trapezoids up to ``limit``, the last one cut.

        A level's defects join at once with the other pixels of exactly its score: two bends of the curve.
        """
        x = np.stack([self.above, self.at_least], axis=1).ravel() / self.background
        y = np.stack([np.concatenate([[0.0], overlap[:-1]]), overlap], axis=1).ravel()
        x, y = np.concatenate([[0.0], x, [1.0]]), np.concatenate([[0.0], y, [1.0]])
        inside = int(np.searchsorted(x, limit, side="right"))
        if inside < len(x):
            step = x[inside] - x[inside - 1]
            cut = y[inside - 1] + (y[inside] - y[inside - 1]) * (limit - x[inside - 1]) / step
            x, y = np.append(x[:inside], limit), np.append(y[:inside], cut)
        return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / limit)
