"""What normal images score that are not in the banks: the scale of heat maps, and a threshold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from murf_fast.anomaly.result import Anomaly


@dataclasses.dataclass(frozen=True)
class NormalRange:
    """Scores of normal images by the banks of others.

    The last images of a fit are held out: their patches are compared with the rows of all images before them, and
    their maps are made as those of any image. Images that are added later are scored by the banks as they were.

    Attributes:
        images: How many were held out.
        middle: Median of a map's pixels, averaged over the images.
        highest: The largest pixel of all maps. Heat maps run from ``middle`` to twice as far above it as ``highest``
            lies, so a part that is as normal as those held out stays in the lower half of the colours.
        score: The largest image score. Few images are held out, so it is where to start, not an error rate.
    """

    images: int
    middle: float
    highest: float
    score: float

    @property
    def limits(self) -> tuple[float, float]:
        """Where the colours of heat maps begin and end."""
        return self.middle, self.middle + 2 * max(self.highest - self.middle, 1e-12)

    @classmethod
    def of(cls, found: Sequence[Anomaly]) -> NormalRange | None:
        """Of the results of held-out images; None without any."""
        if not found:
            return None
        return cls(
            len(found),
            sum(float(anomaly.map.median()) for anomaly in found) / len(found),
            max(float(torch.max(anomaly.map)) for anomaly in found),
            max(anomaly.score for anomaly in found),
        )

    def joined(self, other: NormalRange) -> NormalRange:
        """That of the images of both."""
        images = self.images + other.images
        middle = (self.images * self.middle + other.images * other.middle) / images
        return NormalRange(images, middle, max(self.highest, other.highest), max(self.score, other.score))
