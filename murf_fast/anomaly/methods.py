"""Published methods by name: all of what each says that a detector can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from murf_fast import _arguments
from murf_fast.annotations import BankIndex, Projection

WHAT = "MultiResolutionDetector.by_name"


@dataclass(frozen=True)
class Method:
    """What a method says, as arguments of :class:`MultiResolutionDetector`; how distances become scores is the entry of
    ``PRESETS`` of the same name.

    Attributes:
        depths: The layers, as shares of the model's blocks: of 12 blocks 2/3, 5/6 and 1 are 7, 9 and 11.
        norm, scales, pixels, shorter_side, index, coreset, projection, references: As for the detector.
        left_out: What the method does besides, and the detector does not.
    """

    depths: tuple[float, ...]
    norm: bool
    scales: tuple[float, ...]
    left_out: str
    pixels: float | None = None
    shorter_side: int | None = None
    index: BankIndex = "exact"
    coreset: float = 0.1
    projection: Projection | None = None
    references: float | None = None

    def layers(self, blocks: int) -> list[int]:
        """Those of a model of so many blocks, without repetitions: shallow models have fewer."""
        return list(dict.fromkeys(max(0, int(blocks * depth + 0.5) - 1) for depth in self.depths))


METHODS = {
    # Its search is approximate (index="ivf"), the exact one takes its place.
    "mrf-ad": Method(
        depths=(2 / 3, 5 / 6, 1),
        norm=False,
        scales=(0.3, 0.4, 0.5, 0.6, 0.7),
        pixels=5e6,
        left_out="masks of the background by BEN2; images of fewer pixels are not enlarged unless asked for",
    ),
    # As in anomalib: the second and third quarter of the network, a tenth of the rows.
    "patchcore": Method(
        depths=(1 / 2, 3 / 4),
        norm=False,
        scales=(1.0,),
        shorter_side=256,
        index="coreset",
        projection="sparse",
        left_out="pooling over 3 x 3 patches, and layers joined in one bank; the centre crop",
    ),
    "anomaly-dino": Method(
        depths=(1,),
        norm=True,
        scales=(1.0,),
        shorter_side=448,
        left_out="masks of the object by a principal component, rotated copies of the images",
    ),
    "superad": Method(
        depths=(1 / 4, 1 / 2, 3 / 4, 1),
        norm=True,
        scales=(1.0,),
        shorter_side=448,
        references=0.1,
        left_out="masks of the object by a principal component",
    ),
}


def configured(method: str, blocks: int, **others: object) -> dict[str, Any]:
    """The arguments of a detector for a model of so many blocks, ``others`` in place of the method's.

    Raises:
        ValueError: There is no such method; arguments exclude each other.
    """
    _arguments.choice(WHAT, "method", method, tuple(METHODS))
    said = METHODS[method]
    own = {
        "layers": said.layers(blocks),
        "norm": said.norm,
        "scales": said.scales,
        "pixels": said.pixels,
        "shorter_side": said.shorter_side,
        "index": said.index,
        "coreset": said.coreset,
        "projection": said.projection,
        "references": said.references,
        "rules": method,
    }
    if "pixels" in others:
        own["shorter_side"] = None
    if others.get("shorter_side") is not None:
        if others.get("pixels") is not None:
            raise ValueError(f"murf_fast.{WHAT}: give either `pixels` or `shorter_side`")
        own["pixels"] = None
    found = {**own, **others}
    if found.get("enlarge") and found["pixels"] is None:
        raise ValueError(f"murf_fast.{WHAT}: `enlarge` needs `pixels`, to which images are enlarged")
    return found
