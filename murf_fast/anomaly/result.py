"""What the detector says of an image."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """What :meth:`MultiResolutionDetector.score` returns.

    Attributes:
        map: (H, W), float32, at the image's own size: the score of every pixel, larger where it is less like the banks.
        score: The image's.
    """

    map: Tensor
    score: float
