"""All measures of score maps from one pass over them."""

from __future__ import annotations

from pathlib import Path

from murf_fast import _arguments
from murf_fast.annotations import PixelMap
from murf_fast.anomaly import _pixels
from murf_fast.anomaly._background import MEMORY, SortedRuns, Store
from murf_fast.anomaly._curve import Curve
from murf_fast.anomaly._defects import Defects


class PixelCurves:
    """Takes score maps one by one, and gives AU-PRO, AU-ROC and the best F1 of all so far, exactly::

        curves = PixelCurves()
        for image, mask in images:
            curves.update(detector.score(image).map, mask)
        curves.au_pro(0.05), curves.au_pro(0.3), curves.au_roc(0.05), curves.best_f1()

    The results are those of :func:`au_pro`, :func:`au_roc` and :func:`best_f1` on all maps at once, bit for bit. The
    first measure after an update counts, every further one is cheap; updates may follow.

    Args:
        regions: Whether to label the regions of masks, which `au_pro` needs.
        memory: Bytes of scores outside defects that stay in memory; the others go to a temporary file.
        folder: Where that file is; by default the system's folder for such.

    Raises:
        TypeError, ValueError: An argument is wrong.
        OSError: ``folder`` cannot be written to.
        ModuleNotFoundError: scipy is missing and ``regions`` are wanted; it comes with the extra ``[anomaly]``.

    Memory: ``memory``, about 200 MB, and about 40 bytes per defect pixel; on disk 4 bytes (float64: 8) per other pixel
    beyond ``memory``.
    """

    def __init__(self, regions: bool = True, *, memory: int = MEMORY, folder: str | Path | None = None) -> None:
        regions = _arguments.flag("PixelCurves", "regions", regions)
        self._defects = Defects("PixelCurves", regions)
        self._store = Store(_arguments.integer("PixelCurves", "memory", memory, 0), folder)
        self._others = SortedRuns(self._store.append)
        self._regions = regions
        self._curve: Curve | None = None

    def update(self, map: PixelMap, mask: PixelMap) -> PixelCurves:
        """Adds one image.

        Args:
            map: (H, W) scores: an array, a tensor or the path of a .npy file.
            mask: (H, W), defect where not zero; the same.

        Raises:
            TypeError, ValueError: An argument is wrong: a mask of another size, scores that are not finite. Nothing was
                added.
        """
        scores, defect = _pixels.pair("PixelCurves", "map", map, "mask", mask)
        self._curve = None
        self._defects.add(scores, defect)
        self._others.add(scores[~defect])
        return self

    def au_pro(self, limit: float = 0.05) -> float:
        """:func:`au_pro` of all maps so far."""
        if not self._regions:
            raise ValueError("murf_fast.PixelCurves: `regions` must be true for au_pro, got False")
        return self._measured().au_pro(checked_limit("PixelCurves", limit))

    def au_roc(self, limit: float = 1.0) -> float:
        """:func:`au_roc` of all maps so far."""
        return self._measured().au_roc(checked_limit("PixelCurves", limit))

    def best_f1(self) -> tuple[float, float]:
        """:func:`best_f1` of all maps so far."""
        return self._measured().best_f1()

    def _measured(self) -> Curve:
        if self._curve is None:
            self._others.close()
            ranks = self._defects.ranks()
            for run in self._store:
                ranks.add(run)
            self._curve = self._defects.curve(ranks)
        return self._curve


def checked_limit(what: str, limit: float) -> float:
    if not 0 < _arguments.number(what, "limit", limit) <= 1:
        raise ValueError(f"murf_fast.{what}: `limit` must be in (0, 1], got {limit!r}")
    return limit
