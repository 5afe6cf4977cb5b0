"""What detectors of the commands are made with: a method by name, and options that are to be other than it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from murf_fast.anomaly.detector import MultiResolutionDetector
from murf_fast.anomaly.methods import METHODS, configured
from murf_fast.anomaly.scoring import rules_of
from murf_fast.cli.anomaly.weights import Weights


@dataclasses.dataclass(frozen=True)
class Settings:
    """None: as the method says. ``pixels`` 0: images as they are; ``projection`` "none" and ``references`` 1: none."""

    method: str = "mrf-ad"
    layers: list[int] | None = None
    scales: list[float] | None = None
    norm: bool | None = None
    pixels: float | None = None
    enlarge: bool = False
    shorter_side: int | None = None
    index: str | None = None
    coreset: float | None = None
    projection: str | None = None
    references: float | None = None
    rules: str | None = None
    metric: str | None = None
    k: int | None = None
    neighbors: str | None = None
    fusion: str | None = None
    scale_weights: tuple[float, ...] | None = None
    layer_weights: tuple[float, ...] | None = None
    sigma: float | None = None
    image_score: str | None = None

    def detectors(self, weights: Weights) -> Callable[[], MultiResolutionDetector]:
        """What makes detectors that share one encoder.

        Raises:
            ValueError: There is no such method; options are wrong, or exclude each other.
        """
        others = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        method, rules = others.pop("method"), others.pop("rules", self.method)
        of_rules = {name: others.pop(name) for name in _OF_RULES if name in others}
        if "pixels" in others:
            others["pixels"] = others["pixels"] or None
        if others.get("projection") == "none":
            others["projection"] = None
        if others.get("references") == 1:  # all of them: none is chosen
            others["references"] = None
        options = configured(method, weights.blocks, **others)
        if options["index"] != "coreset" and (self.coreset is not None or self.projection not in (None, "none")):
            raise ValueError(f"--coreset and --projection need --index coreset, got {options['index']}")
        options["rules"] = dataclasses.replace(rules_of(rules), **of_rules)
        encoder = weights.encoder(options.pop("layers"), options.pop("scales"), options.pop("norm"))

        def made() -> MultiResolutionDetector:
            detector = MultiResolutionDetector(encoder, **options)
            detector.method = method
            return detector

        return made


_OF_RULES = (
    "metric",
    "k",
    "neighbors",
    "fusion",
    "scale_weights",
    "layer_weights",
    "sigma",
    "image_score",
)


def left_out(method: str | None) -> str | None:
    """What a method does besides; None where it is not known."""
    return METHODS[method].left_out if method in METHODS else None
