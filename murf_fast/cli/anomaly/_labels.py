"""What folder names say of images, and how well scores tell good from defective ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from murf_fast.anomaly.metrics import au_roc
from murf_fast.cli.anomaly._images import ImageFile, shown

GOOD = ("good", "normal", "ok")


@dataclass(frozen=True)
class Separation:
    """How well image scores tell good from defective: AUROC, and the largest F1 with the threshold that has it."""

    auroc: float
    f1: float
    threshold: float


def is_defective(file: ImageFile) -> bool:
    """By the folders that a file lies in: ``good``, ``normal`` and ``ok`` hold good ones, all others defects."""
    return not any(folder.lower() in GOOD for folder in file.folders)


def labels(files: Sequence[ImageFile]) -> list[bool]:
    """Raises where all images are of one kind: then nothing can be told apart."""
    found = [is_defective(file) for file in files]
    if all(found) or not any(found):
        kind = "defective" if found[0] else "good"
        raise ValueError(
            f"--labelled needs good and defective images: those in folders named {', '.join(GOOD)} are good, others "
            f"defective; {shown(files[0].path)} and all others are {kind}"
        )
    return found


def separation(scores: Sequence[float], defective: Sequence[bool]) -> Separation:
    """F1 is 2 TP / (2 TP + FP + FN), where an image is taken for defective whose score is at the threshold or above."""
    scores, defective = np.asarray(scores, dtype=np.float64), np.asarray(defective)
    thresholds = np.unique(scores)[::-1]
    taken = scores[None] >= thresholds[:, None]
    f1 = 2 * (taken & defective).sum(1) / (taken.sum(1) + defective.sum())
    best = int(f1.argmax())
    # Equal scores rank nothing: as good as chance.
    auroc = 0.5 if thresholds.size == 1 else au_roc([scores[None]], [defective[None]])
    return Separation(float(auroc), float(f1[best]), float(thresholds[best]))
