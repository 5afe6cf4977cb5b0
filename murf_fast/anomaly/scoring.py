"""From patch distances to a map and one number: the rules of MRF-AD, PatchCore and AnomalyDINO."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from murf_fast import _arguments
from murf_fast.ops.gaussian_blur import BORDERS
from murf_fast.ops.nearest_distance import METRICS, NearestIndex, nearest_distance
from murf_fast.tables.resize import MODES

IMAGE_SCORES = ("max", "top1%", "reweighted")


@dataclass(frozen=True)
class ScoringRules:
    """How distances become scores.

    Attributes:
        metric: As for :func:`nearest_distance`.
        k: Neighbours whose distances are averaged.
        mode: Interpolation from the patches to the image.
        sigma: Gaussian smoothing of the map in pixels; 0 for none.
        border: As for :func:`gaussian_blur`.
        image_score: ``"max"`` of the patches, ``"top1%"``: mean of the largest hundredth of them, or ``"reweighted"``:
            PatchCore's weighted maximum.

    Raises:
        TypeError, ValueError: An attribute is wrong; the message names it.

    Source: MRF-AD section 4, PatchCore, AnomalyDINO: the entries of ``PRESETS``.
    """

    metric: str = "l2"
    k: int = 1
    mode: str = "bilinear"
    sigma: float = 0.0
    border: str = "symmetric"
    image_score: str = "max"

    def __post_init__(self) -> None:
        what = "ScoringRules"
        _arguments.choice(what, "metric", self.metric, METRICS)
        _arguments.choice(what, "image_score", self.image_score, IMAGE_SCORES)
        _arguments.choice(what, "mode", self.mode, MODES)
        _arguments.choice(what, "border", self.border, BORDERS)
        sigma = _arguments.number(what, "sigma", self.sigma)
        if not 0 <= sigma < 1e6:
            raise ValueError(f"murf_fast.{what}: `sigma` must be a number of pixels, 0 or more, got {self.sigma!r}")
        # As Python's numbers, which an index in JSON can hold.
        object.__setattr__(self, "k", _arguments.integer(what, "k", self.k, 1))
        object.__setattr__(self, "sigma", sigma)


PRESETS = {
    "mrf-ad": ScoringRules(),
    "patchcore": ScoringRules(mode="nearest", sigma=4.0, border="reflect", image_score="reweighted"),
    "anomaly-dino": ScoringRules(metric="cosine", sigma=4.0, image_score="top1%"),
}


def rules_of(rules: str | ScoringRules) -> ScoringRules:
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
    query: Tensor, distances: Tensor, indices: Tensor, index: NearestIndex, neighbors: int = 9
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
    nearest = index.bank[indices[farthest].to(index.bank.device)][None].to(query.device)
    _, around = nearest_distance(nearest, index, k=min(neighbors, len(index)))
    rows = index.bank[around[0].to(index.bank.device)].to(query.device)
    beyond = (rows.double() - query[farthest].double()).square().sum(1).sqrt()
    return (1 - float(torch.softmax(beyond, 0)[0])) * largest
