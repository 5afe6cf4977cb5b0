"""What ``**options`` hold: arguments of a class that they are passed on to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypedDict

from torch import Tensor

from murf_fast.annotations import AnomalyRules, BankIndex, Precision, Projection
from murf_fast.anomaly.scoring import ScoringRules


class DetectorOptions(TypedDict, total=False):
    """Of :class:`MultiResolutionDetector`, all but its encoder."""

    layers: Sequence[int]
    scales: Sequence[float]
    index: BankIndex
    foreground: Callable[[Tensor], Tensor] | None
    pixels: float | None
    enlarge: bool
    norm: bool
    shorter_side: int | None
    rules: AnomalyRules | ScoringRules
    coreset: float
    projection: Projection | None
    references: float | None
    background: Literal["black", "keep"]
    precision: Precision
    on_empty: Literal["skip", "raise"]
