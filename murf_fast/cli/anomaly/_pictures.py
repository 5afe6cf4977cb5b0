"""Pictures of scored images on one scale: that of the bank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from murf_fast import _pillow
from murf_fast.anomaly.detector import MultiResolutionDetector
from murf_fast.anomaly.normal_range import NormalRange
from murf_fast.cli.anomaly import _picture
from murf_fast.cli.anomaly._images import ImageFile, shown
from murf_fast.cli.anomaly._scores import Row
from murf_fast.cli.anomaly._threshold import Threshold

ABOVE = 0.1  # of the scale below the line: so much there is above it at least


@dataclass(frozen=True)
class Pictures:
    """One picture per image, all on one scale where the bank has one."""

    detector: MultiResolutionDetector
    weights: str
    vmax: float | None
    pixel_threshold: float | None

    def draw(self, file: ImageFile, heat: np.ndarray, row: Row, threshold: Threshold, path: Path) -> None:
        normal = self.detector.normal_
        line, name = threshold.line(self.pixel_threshold, self.detector.rules, normal)
        scale = _scale(normal, heat, self.vmax, line)
        path.parent.mkdir(parents=True, exist_ok=True)
        verdict = "" if row.verdict is None else f", {row.verdict.upper()} (threshold {threshold.score:.4g})"
        title = f"{shown(file.path.name)}: image score {row.score:.4g}{verdict}"
        told = "" if line is None else f"line: {line:.4g}, {name}; "
        note = f"{told}{len(self.detector.banks_)} banks of {self.detector.images_} images; {self.weights}"
        _picture.draw(_picture.panels(_pillow.read(file.path), heat, scale), scale, title, note, path)


def _scale(normal: NormalRange | None, heat: np.ndarray, vmax: float | None, line: float | None) -> _picture.Scale:
    """The bank's, so that maps can be compared, as long as the line needs; the map's own where the bank has none."""
    low, high = normal.limits if normal is not None else (float(heat.min()), float(heat.max()))
    if vmax is not None:
        return _picture.Scale(low, vmax, line)
    if normal is not None and line is not None:
        low, high = min(low, line), max(high, line + ABOVE * (line - low))
    return _picture.Scale(low, high, line)
