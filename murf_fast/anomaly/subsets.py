"""What any choice of layers and scales says of an image, from one encoding and one search per bank."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from murf_fast import _arguments
from murf_fast.annotations import Image, SubsetKind
from murf_fast.anomaly._patches import LookedAt, Patches
from murf_fast.anomaly.detector import MultiResolutionDetector
from murf_fast.anomaly.result import Anomaly

WHAT = "subset_scores"
KINDS = ("none", "scales", "layers", "scales-x-layers", "all")
ALL = "all layers and scales"


class Subset(NamedTuple):
    """Some of a detector's layers and scales (sizes, of an encoder at sizes), whose banks count, each with each."""

    layers: tuple[int, ...]
    scales: tuple[float, ...] | tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class BankDistances:
    """The distances of an image's patches to every bank, of which any subset's scores are made.

    Attributes:
        size: (height, width) of the image.
        maps: (1, 1, h, w), float32, per bank (layers fastest); None where the image has no patch that counts.
        weighted: PatchCore's score of the image by every bank, where the rules want them.
    """

    size: tuple[int, int]
    maps: list[Tensor | None]
    weighted: list[float]


def subsets_of(detector: MultiResolutionDetector, kind: SubsetKind) -> dict[str, Subset]:
    """Subsets by name, that of all layers and scales last.

    Args:
        kind: ``"none"``: the last alone. ``"scales"``: every scale with all layers. ``"layers"``: every layer with all
            scales. ``"scales-x-layers"``: both, and every layer at every scale. ``"all"``: every choice of layers with
            every choice of scales.

    Raises:
        ValueError: ``kind`` is none of these.

    Source: MRF-AD, Tables 3 and 8, Figure 5.
    """
    _arguments.choice("subsets_of", "kind", kind, KINDS)
    layers, scales = tuple(detector.encoder.layers), _scales(detector)
    singles_of_scales = [Subset(layers, (s,)) for s in scales] if kind in ("scales", "scales-x-layers") else []
    singles_of_layers = [Subset((n,), scales) for n in layers] if kind in ("layers", "scales-x-layers") else []
    found = [*singles_of_scales, *singles_of_layers]
    if kind == "scales-x-layers":
        found += [Subset((n,), (s,)) for n in layers for s in scales]
    if kind == "all":
        found += [Subset(n, s) for n in _choices(layers) for s in _choices(scales)]
    whole = Subset(layers, scales)
    return {**{_name(s, whole): s for s in found if s != whole}, ALL: whole}


def banks_of(detector: MultiResolutionDetector, subset: Subset) -> list[int]:
    """The indices of a subset's banks.

    Raises:
        ValueError: It names none, or one that the detector does not have.
    """
    is_subset = isinstance(subset, tuple) and len(subset) == 2
    if not is_subset or not all(isinstance(chosen, (tuple, list)) for chosen in subset):
        raise TypeError(f"murf_fast.{WHAT}: `subsets` must hold Subset(layers, scales), two tuples, got {subset!r}")
    subset, own = Subset(*subset), Subset(tuple(detector.encoder.layers), _scales(detector))
    for name, chosen, there in zip(Subset._fields, subset, own, strict=True):
        unknown = [c for c in chosen if c not in there]
        if unknown or not chosen:
            raise ValueError(f"murf_fast.{WHAT}: `subsets` must have {name} of {list(there)}, got {list(chosen)}")
    n = len(own.layers)
    return [own.scales.index(s) * n + own.layers.index(layer) for s in subset.scales for layer in subset.layers]


def bank_distances(
    detector: MultiResolutionDetector, images: Iterable[Image], *, batch: int | None = None
) -> Iterator[BankDistances]:
    """Of every image in order, each searched in every bank once; else as ``detector.score_many``."""
    detector._fitted()
    for pairs in detector._encoded(images, batch):
        while pairs:
            yield _distances(detector, *pairs.pop(0))


def _distances(detector: MultiResolutionDetector, looked: LookedAt, of_image: list[Patches]) -> BankDistances:
    return BankDistances(looked.size, *detector._searched(of_image))


def anomaly_of(detector: MultiResolutionDetector, distances: BankDistances, subset: Subset) -> Anomaly:
    """What the banks of a subset say, by the detector's rules."""
    banks = banks_of(detector, subset)
    return detector._anomaly(distances.size, distances.maps, distances.weighted, banks)


def subset_scores(
    detector: MultiResolutionDetector, image: Image, subsets: SubsetKind | Mapping[str, Subset]
) -> dict[str, Anomaly]:
    """What every subset of a detector's layers and scales says of an image, from one encoding and one search per bank.

    Equal, up to the order of sums, to the scores of detectors fitted with those layers and scales alone; but where no
    bank of a subset has a row, or counts by the rules' weights, it is 0, and such a detector would be refused.

    Args:
        detector: A fitted one.
        image: As for ``detector.score``.
        subsets: :class:`Subset` by name, or a kind of :func:`subsets_of`.

    Returns:
        An :class:`Anomaly` by name, in the order of ``subsets``.

    Raises:
        TypeError, ValueError: As ``detector.score``; a subset names a layer or scale that the detector does not have.

    Memory: as ``detector.score``, and one map of the image's size per subset.

    Source: MRF-AD, Tables 3 and 8, Figures 2 and 5.
    """
    if not isinstance(subsets, (str, Mapping)):
        raise TypeError(f"murf_fast.{WHAT}: `subsets` must be a kind or Subsets by name, got {type(subsets).__name__}")
    chosen = subsets_of(detector, subsets) if isinstance(subsets, str) else dict(subsets)
    for subset in chosen.values():
        banks_of(detector, subset)
    (distances,) = bank_distances(detector, [image])
    return {name: anomaly_of(detector, distances, subset) for name, subset in chosen.items()}


def _scales(detector: MultiResolutionDetector) -> tuple[Any, ...]:
    return tuple(detector.encoder.scales or detector.encoder.sizes or ())


def _choices(items: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Every choice of at least one, small choices first."""
    return [c for n in range(1, len(items) + 1) for c in itertools.combinations(items, n)]


def _name(subset: Subset, whole: Subset) -> str:
    """As in the paper's Table 8: "7+9+11 - 0.3"; "all" where nothing is left out."""
    texts = []
    for chosen, there in zip(subset, whole, strict=True):
        texts.append("all" if chosen == there else "+".join(_text(c) for c in chosen))
    return " - ".join(texts)


def _text(item: object) -> str:
    return f"{item[0]}x{item[1]}" if isinstance(item, tuple) else f"{item:g}"
