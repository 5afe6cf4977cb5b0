"""Area under the per-region-overlap and ROC curves, up to a limit of the false-positive rate.

Only the scores of defect pixels can move the overlap, so the one sort is over those; every other pixel is counted into
the gaps between them. The curve is the one of a sort over all pixels, point by point where it bends.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from murf_fast import _arguments


def au_pro(scores: Iterable, masks: Iterable, limit: float = 0.05) -> float:
    """Area under the per-region-overlap curve up to a false-positive rate, divided by that rate.

    A threshold's overlap is the mean, over all 8-connected defect regions of all images, of the share of a region's
    pixels with a score at or above it. Between thresholds, and at ``limit``, the curve is linear.

    Args:
        scores: (H, W) score maps of any images, or (N, H, W): tensors or arrays. Sizes may differ.
        masks: One (H, W) mask per map, defect where not zero.
        limit: in (0, 1]; 0.05 in MVTec AD 2, 0.3 in MVTec AD.

    Returns:
        A number in [0, 1].

    Raises:
        TypeError, ValueError: An argument is wrong: a mask of another size, scores that are not finite or all equal, no
            defect pixel, no other pixel.
        ModuleNotFoundError: scipy is missing; it comes with the extra ``[anomaly]``.

    Memory: about 130 bytes per defect pixel, one per pixel of all masks, and 12 per pixel of one map.

    Source: MVTec AD's official evaluation (Bergmann et al. 2021, section 4).
    """
    return _area(*_curve("au_pro", scores, masks, limit, by_region=True), limit)


def au_roc(scores: Iterable, masks: Iterable, limit: float = 1.0) -> float:
    """Area under the pixels' ROC curve up to a false-positive rate, divided by that rate.

    Arguments, result, errors and memory as for :func:`au_pro`, but scipy is not needed; ``limit=1`` is the ordinary
    AUROC.
    """
    return _area(*_curve("au_roc", scores, masks, limit, by_region=False), limit)


def _curve(
    what: str, scores: Iterable, masks: Iterable, limit: float, by_region: bool
) -> tuple[np.ndarray, np.ndarray]:
    """False-positive rates and overlaps at every bend, from (0, 0) to (1, 1)."""
    if not 0 < _arguments.number(what, "limit", limit) <= 1:
        raise ValueError(f"murf_fast.{what}: `limit` must be in (0, 1], got {limit!r}")
    maps, regions = [_array(m) for m in scores], [_array(m) for m in masks]
    _check(what, maps, regions)
    defects = [mask != 0 for mask in regions]
    if not any(d.any() for d in defects):
        raise ValueError(f"murf_fast.{what}: `masks` have no defect pixel")
    if all(d.all() for d in defects):
        raise ValueError(f"murf_fast.{what}: `masks` have no pixel without defect")
    first = maps[0].flat[0]
    if all((m == first).all() for m in maps):
        raise ValueError(f"murf_fast.{what}: `scores` are all equal, {first}: there is nothing to rank")
    defect_scores = np.concatenate([m[d] for m, d in zip(maps, defects, strict=True)])
    weights = np.concatenate([_weights(d, by_region) for d in defects])
    levels, inverse = np.unique(defect_scores, return_inverse=True)
    gains = np.bincount(inverse, weights=weights, minlength=len(levels))
    above, reached = (np.zeros(len(levels) + 1, dtype=np.int64) for _ in range(2))
    for m, d in zip(maps, defects, strict=True):
        others = m[~d]
        above += np.bincount(np.searchsorted(levels, others, side="left"), minlength=len(levels) + 1)
        reached += np.bincount(np.searchsorted(levels, others, side="right"), minlength=len(levels) + 1)
    background = above.sum()
    # Falling levels: a level's defects join at once with the other pixels of exactly its score.
    before = np.cumsum(above[::-1])[:-1] / background
    after = np.cumsum(reached[::-1])[:-1] / background
    overlap = np.minimum(np.cumsum(gains[::-1]) / gains.sum(), 1.0)
    fpr = np.stack([before, after], axis=1).ravel()
    pro = np.stack([np.concatenate([[0.0], overlap[:-1]]), overlap], axis=1).ravel()
    return np.concatenate([[0.0], fpr, [1.0]]), np.concatenate([[0.0], pro, [1.0]])


def _area(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    """The trapezoids up to ``limit``, the last one cut."""
    inside = int(np.searchsorted(x, limit, side="right"))
    if inside < len(x):
        step = x[inside] - x[inside - 1]
        cut = y[inside - 1] + (y[inside] - y[inside - 1]) * (limit - x[inside - 1]) / step
        x, y = np.append(x[:inside], limit), np.append(y[:inside], cut)
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / limit)


def _weights(defect: np.ndarray, by_region: bool) -> np.ndarray:
    """What each defect pixel of an image adds: its share of its region, or one."""
    if not by_region:
        return np.ones(np.count_nonzero(defect))
    try:
        from scipy import ndimage
    except ModuleNotFoundError as error:
        message = "murf_fast.au_pro needs scipy: pip install 'murf-fast[anomaly]'"
        raise ModuleNotFoundError(message, name="scipy") from error
    labels, _ = ndimage.label(defect, structure=np.ones((3, 3), dtype=bool))
    labels = labels[defect]
    return 1.0 / np.bincount(labels)[labels]


def _check(what: str, maps: list[np.ndarray], masks: list[np.ndarray]) -> None:
    if len(maps) != len(masks) or not maps:
        raise ValueError(
            f"murf_fast.{what}: `scores` and `masks` must be as many, at least one, got {len(maps)} and {len(masks)}"
        )
    for i, (m, mask) in enumerate(zip(maps, masks, strict=True)):
        if m.ndim != 2 or not np.issubdtype(m.dtype, np.floating):
            raise TypeError(f"murf_fast.{what}: `scores[{i}]` must be a floating-point (H, W), got {m.dtype} {m.shape}")
        if mask.shape != m.shape:
            raise ValueError(
                f"murf_fast.{what}: `masks[{i}]` must have the size of its map, {m.shape}, got {mask.shape}"
            )
        if not np.isfinite(m).all():
            raise ValueError(
                f"murf_fast.{what}: `scores[{i}]` has {(~np.isfinite(m)).sum()} values that are not finite"
            )


def _array(x: object) -> np.ndarray:
    if hasattr(x, "detach"):
        x = x.detach().resolve_neg()
        x = (x.float() if x.is_floating_point() and x.element_size() < 4 else x).cpu().numpy()
    return np.asarray(x)
