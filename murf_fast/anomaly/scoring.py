"""From patch distances to a map and one number: the rules of MRF-AD, PatchCore, AnomalyDINO and SuperAD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from murf_fast import _arguments
from murf_fast.annotations import AnomalyRules, Border, Distance, Mode
from murf_fast.anomaly.sharded_index import ShardedIndex
from murf_fast.ops.gaussian_blur import BORDERS
from murf_fast.ops.nearest_distance import NearestIndex, nearest_distance
from murf_fast.ops.resize import resize
from murf_fast.ops.upsample_mean import upsample_mean
from murf_fast.tables.resize import MODES

METRICS = ("l2", "l2sq", "cosine")  # distances: a larger inner product is no larger score
IMAGE_SCORES = ("max", "top1%", "reweighted")
NEIGHBORS = ("mean", "kth")
FUSIONS = ("mean", "max")


@dataclass(frozen=True)
class ScoringRules:
    """How distances become scores.

    Attributes:
        metric: As for :func:`nearest_distance`.
        k: Nearest rows that are looked at.
        neighbors: ``"mean"`` of their k distances, or ``"kth"``: the largest of them, which single odd rows in a bank
            do not move.
        fusion: ``"mean"`` of the maps of all banks, or ``"max"``: in every pixel the largest of them.
        scale_weights, layer_weights: For ``fusion="mean"``, one number per scale and per layer of the detector. A bank
            weighs the product of the two, relative to all; None: all alike.
        mode: Interpolation from the patches to the image.
        sigma: Gaussian smoothing of the map in pixels; 0 for none.
        border: As for :func:`gaussian_blur`.
        image_score: ``"max"`` of the patches, ``"top1%"``: mean of the largest hundredth of them, or ``"reweighted"``:
            PatchCore's weighted maximum.

    Raises:
        TypeError, ValueError: An attribute is wrong; the message names it.

    Source: MRF-AD section 4, PatchCore, AnomalyDINO, SuperAD: the entries of ``PRESETS``.
    """

    metric: Distance = "l2"
    k: int = 1
    mode: Mode = "bilinear"
    sigma: float = 0.0
    border: Border = "symmetric"
    image_score: Literal["max", "top1%", "reweighted"] = "max"
    neighbors: Literal["mean", "kth"] = "mean"
    fusion: Literal["mean", "max"] = "mean"
    scale_weights: tuple[float, ...] | None = None
    layer_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        what = "ScoringRules"
        _arguments.choice(what, "metric", self.metric, METRICS)
        _arguments.choice(what, "image_score", self.image_score, IMAGE_SCORES)
        _arguments.choice(what, "mode", self.mode, MODES)
        _arguments.choice(what, "border", self.border, BORDERS)
        _arguments.choice(what, "neighbors", self.neighbors, NEIGHBORS)
        _arguments.choice(what, "fusion", self.fusion, FUSIONS)
        for name in ("scale_weights", "layer_weights"):
            object.__setattr__(self, name, self._weights(name))
        sigma = _arguments.number(what, "sigma", self.sigma)
        if not 0 <= sigma < 1e6:
            raise ValueError(f"murf_fast.{what}: `sigma` must be a number of pixels, 0 or more, got {self.sigma!r}")
        # As Python's numbers, which an index in JSON can hold.
        object.__setattr__(self, "k", _arguments.integer(what, "k", self.k, 1))
        object.__setattr__(self, "sigma", sigma)

    def _weights(self, name: str) -> tuple[float, ...] | None:
        given = getattr(self, name)
        if given is None:
            return None
        if self.fusion == "max":
            raise ValueError(f'murf_fast.ScoringRules: `{name}` must be None for fusion="max", got {given!r}')
        weights = tuple(_arguments.numbers("ScoringRules", name, given))
        if not weights or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            raise ValueError(f"murf_fast.ScoringRules: `{name}` must be 0 or more, and not all 0, got {given!r}")
        return weights

    def of_neighbors(self, distances: Tensor) -> Tensor:
        """(Q,): what a patch scores, by the distances (Q, k) of its nearest rows, the nearest first."""
        return distances.mean(1) if self.neighbors == "mean" else distances[:, -1]

    def bank_weights(self, scales: int, layers: int) -> list[float] | None:
        """One weight per bank, layers fastest; None where all are alike.

        Raises:
            ValueError: There are not as many weights as scales or layers.
        """
        if self.scale_weights is None and self.layer_weights is None:
            return None
        factors = []
        for name, count in (("scale_weights", scales), ("layer_weights", layers)):
            weights = getattr(self, name) or (1.0,) * count
            if len(weights) != count:
                raise ValueError(
                    f"murf_fast.MultiResolutionDetector: `rules.{name}` must be {count} numbers, one for each of the "
                    f"detector's, got {weights}"
                )
            factors.append(weights)
        return [of_scale * of_layer for of_scale in factors[0] for of_layer in factors[1]]

    def fused(
        self, maps: Sequence[Tensor], size: tuple[int, int], weights: Sequence[float] | None, mode: Mode | None = None
    ) -> Tensor:
        """(1, 1, height, width): the maps (1, 1, h, w) of banks brought to one size, by ``mode``, and fused."""
        mode = mode or self.mode
        if self.fusion == "mean":
            return upsample_mean(maps, size, weights, mode=mode)
        largest = resize(maps[0], size, mode=mode)
        for other in maps[1:]:
            torch.maximum(largest, resize(other, size, mode=mode), out=largest)
        return largest

    def fused_numbers(self, numbers: Sequence[float], weights: Sequence[float] | None) -> float:
        """The same of one number per bank."""
        if self.fusion == "max":
            return max(numbers)
        weights = weights or [1.0] * len(numbers)
        return sum(w * n for w, n in zip(weights, numbers, strict=True)) / sum(weights)


PRESETS = {
    "mrf-ad": ScoringRules(),
    "mrf-max": ScoringRules(fusion="max"),
    "patchcore": ScoringRules(mode="nearest", sigma=4.0, border="reflect", image_score="reweighted"),
    "anomaly-dino": ScoringRules(metric="cosine", sigma=4.0, image_score="top1%"),
    # Its map is not smoothed where it is handed in at the image's size; it says no score of an image.
    "superad": ScoringRules(metric="cosine", image_score="top1%"),
}


def rules_of(rules: AnomalyRules | ScoringRules) -> ScoringRules:
    """Rules by name, or as they are."""
    if isinstance(rules, ScoringRules):
        return rules
    if not isinstance(rules, str) or rules not in PRESETS:
        raise ValueError(f"murf_fast.MultiResolutionDetector: `rules` must be one of {tuple(PRESETS)}, got {rules!r}")
    return PRESETS[rules]


def mean_top(scores: Tensor, fraction: float = 0.01) -> float:
    """Mean of the largest ``fraction`` of the scores; the maximum where that is less than one of them.

    Args:
        scores: Floating point, any shape, not empty.
        fraction: Share of the scores, rounded down to a number of them.

    Source: AnomalyDINO's image score.
    """
    count = max(1, int(scores.numel() * fraction))
    return float(scores.flatten().topk(count).values.mean())


def reweighted_score(
    query: Tensor, distances: Tensor, indices: Tensor, index: NearestIndex | ShardedIndex, neighbors: int = 9
) -> float:
    """PatchCore's image score: the largest patch distance, times how far its neighbour's neighbours are beyond it.

    ``s = (1 - softmax(|x - n_1|, ..., |x - n_b|)_1) |x - n_1|`` for the farthest patch x, its nearest bank row n_1, and
    the b rows nearest to n_1, itself first.

    Args:
        query: (Q, D) patches of one image.
        distances, indices: (Q,) of their nearest rows.
        index: The bank; of its rows only those of the neighbourhood are read.
        neighbors: b, at most the rows of the bank are taken; with 1 the score is the maximum.

    Source: PatchCore (Roth et al. 2022), section 3.3, as in anomalib.
    """
    farthest = int(distances.argmax())
    largest = float(distances[farthest])
    if neighbors == 1:
        return largest
    neighbors = min(neighbors, len(index))
    nearest = _rows(index, indices[farthest][None]).to(query.device)
    if isinstance(index, ShardedIndex):
        _, around = index.search(nearest, k=neighbors, metric=None)
    else:
        _, around = nearest_distance(nearest, index, k=neighbors)
    rows = _rows(index, around[0]).to(query.device)
    beyond = (rows.double() - query[farthest].double()).square().sum(1).sqrt()
    return (1 - float(torch.softmax(beyond, 0)[0])) * largest


def _rows(index: NearestIndex | ShardedIndex, numbers: Tensor) -> Tensor:
    if isinstance(index, ShardedIndex):
        return index.rows(numbers)
    return index.bank[numbers.to(index.bank.device)]
