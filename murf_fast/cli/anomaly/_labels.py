"""What folder names say of images, and how well scores tell good from defective ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from murf_fast.anomaly.datasets import GOOD
from murf_fast.anomaly.metrics import au_roc, best_f1
from murf_fast.cli.anomaly._images import ImageFile, shown


@dataclass(frozen=True)
class Separation:
    """How well image scores tell good from defective: AUROC, and the largest F1 with the threshold that has it."""

    auroc: float
    f1: float
    threshold: float


@dataclass(frozen=True)
class Mistakes:
    """What a threshold gets wrong: defective images that pass, of all of them, and good ones that fail."""

    missed: int
    defective: int
    rejected: int
    good: int

    @classmethod
    def of(cls, scores: Sequence[float], defective: Sequence[bool], threshold: float) -> Mistakes:
        fails = [score >= threshold for score in scores]
        pairs = list(zip(fails, defective, strict=True))
        return cls(
            sum(label and not failed for failed, label in pairs),
            sum(defective),
            sum(failed and not label for failed, label in pairs),
            len(pairs) - sum(defective),
        )


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
    if (scores == scores[0]).all():
        # They rank nothing, which is as good as chance, and all are taken for defective.
        share = defective.mean()
        return Separation(0.5, float(2 * share / (1 + share)), float(scores[0]))
    return Separation(au_roc(scores, defective), *best_f1(scores, defective))
