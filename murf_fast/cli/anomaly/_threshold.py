"""From which score on an image fails: a number, the bank's own range, or what separates labelled images best."""

from __future__ import annotations

import math
from dataclasses import dataclass

from murf_fast.anomaly.normal_range import NormalRange
from murf_fast.anomaly.scoring import ScoringRules

BANK, LABELLED = "bank", "labelled"
PASS, FAIL = "pass", "fail"


@dataclass(frozen=True)
class Threshold:
    """The score of an image from which on it fails, None where there is none (yet), and where it comes from."""

    score: float | None
    source: str

    @classmethod
    def of(cls, given: str | None, normal: NormalRange | None) -> Threshold:
        """By the option: a number, ``bank`` (also if it is left out) or ``labelled``, which is known after the images.

        Raises:
            ValueError: The bank was asked for its range, and has none.
        """
        if given == LABELLED:
            return cls(None, LABELLED)
        if given not in (None, BANK):
            return cls(float(given), "given")
        if normal is None and given == BANK:
            raise ValueError(
                "--threshold bank needs a bank with a range of normal images; fit it again with --held-out"
            )
        return cls(None if normal is None else normal.score, BANK)

    def verdict(self, score: float) -> str | None:
        if self.score is None:
            return None
        return FAIL if score >= self.score else PASS

    def line(self, pixel: float | None, rules: ScoringRules, normal: NormalRange | None) -> tuple[float | None, str]:
        """The score of the line on heat maps, and what it is.

        It is ``pixel`` if given. Else the image's threshold, where an image scores what its highest patch does; with
        other rules images and pixels score on different scales, and it is the bank's highest normal pixel.
        """
        if pixel is not None:
            return pixel, "--pixel-threshold"
        if self.source != BANK and self.score is not None and rules.image_score == "max" and not rules.sigma:
            return self.score, "the threshold"
        if normal is not None:
            return normal.highest, f"highest pixel of {normal.images} held-out images"
        return None, ""

    def __str__(self) -> str:
        told = {BANK: "the largest of the bank's held-out normal images", LABELLED: "the best F1 of these images"}
        return f"{self.score:.6g}, {told.get(self.source, 'given by --threshold')}"


def check(given: str | None) -> None:
    """Refuses what is no threshold."""
    if given in (None, BANK, LABELLED):
        return
    try:
        is_number = math.isfinite(float(given))
    except ValueError:
        is_number = False
    if not is_number:
        raise ValueError(f"--threshold must be a number, {BANK} or {LABELLED}, got {given}")
