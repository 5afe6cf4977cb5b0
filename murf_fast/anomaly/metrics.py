"""Measures of score maps: areas under the per-region-overlap and ROC curves up to a false-positive rate, and F1.

Only the scores of defect pixels can move them, so only those are kept; every other pixel is counted into the gaps
between them. The curves are those of a sort over all pixels, point by point where they bend.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from murf_fast.annotations import PixelMap
from murf_fast.anomaly import _pixels
from murf_fast.anomaly._background import MEMORY, SortedRuns, Store
from murf_fast.anomaly._curve import Curve
from murf_fast.anomaly._defects import Defects
from murf_fast.anomaly.pixel_curves import checked_limit

# Maps, or numbers of whole images.
Scores = Iterable[PixelMap] | Iterable[float]


def au_pro(scores: Iterable[PixelMap], masks: Iterable[PixelMap], limit: float = 0.05) -> float:
    """Area under the per-region-overlap curve up to a false-positive rate, divided by that rate.

    A threshold's overlap is the mean, over all 8-connected defect regions of all images, of the share of a region's
    pixels with a score at or above it. Between thresholds, and at ``limit``, the curve is linear.

    Args:
        scores: (H, W) score maps of any images, or (N, H, W): tensors, arrays, memory-mapped arrays or paths of .npy
            files. Sizes may differ. An iterator is read once; anything else, such as a list of paths, twice.
        masks: One (H, W) mask per map, defect where not zero; given as maps are.
        limit: in (0, 1]; 0.05 in MVTec AD 2, 0.3 in MVTec AD.

    Returns:
        A number in [0, 1].

    Raises:
        TypeError, ValueError: An argument is wrong: a mask of another size, scores that are not finite or all equal, no
            defect pixel, no other pixel.
        ModuleNotFoundError: scipy is missing; it comes with the extra ``[anomaly]``.

    Memory: about 40 bytes per defect pixel, 200 MB, and that of one map; of an iterator also what
    :class:`PixelCurves` keeps, on disk where it is much.

    Source: MVTec AD's official evaluation (Bergmann et al. 2021, section 4).
    """
    limit = checked_limit("au_pro", limit)
    return _curve("au_pro", scores, masks, regions=True).au_pro(limit)


def au_roc(scores: Scores, masks: Scores, limit: float = 1.0) -> float:
    """Area under the pixels' ROC curve up to a false-positive rate, divided by that rate.

    Arguments, result, errors and memory as for :func:`au_pro`, but scipy is not needed, and ``scores`` may be those of
    whole images, (N,), with (N,) labels for ``masks``. ``limit=1`` is the ordinary AUROC.
    """
    limit = checked_limit("au_roc", limit)
    return _curve("au_roc", *_pixels.images("au_roc", scores, masks), regions=False).au_roc(limit)


def best_f1(scores: Scores, masks: Scores) -> tuple[float, float]:
    """The largest F1 of all thresholds, and the highest threshold that has it: a score, at or above which is defect.

    F1 is 2 TP / (2 TP + FP + FN), over the pixels of all images.

    Arguments, errors and memory as for :func:`au_roc`.
    """
    return _curve("best_f1", *_pixels.images("best_f1", scores, masks), regions=False).best_f1()


def _curve(what: str, scores: Iterable[Any], masks: Iterable[Any], regions: bool) -> Curve:
    """Defects first, then the other pixels among them; those of an iterator are stored in between."""
    defects = Defects(what, regions)
    if isinstance(scores, Iterator) or isinstance(masks, Iterator):
        store = Store(MEMORY, None)
        others = SortedRuns(store.append)
        for map, defect in _pixels.pairs(what, scores, masks):
            defects.add(map, defect)
            others.add(map[~defect])
        others.close()
        ranks = defects.ranks()
        for run in store:
            ranks.add(run)
    else:
        for map, defect in _pixels.pairs(what, scores, masks):
            defects.add(map, defect)
        ranks = defects.ranks()
        others = SortedRuns(ranks.add)
        for map, defect in _pixels.pairs(what, scores, masks):
            others.add(map[~defect])
        others.close()
    return defects.curve(ranks)
