"""What banks say of the patches of an image: distances per bank, and from them a map and a score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from murf_fast.anomaly._indices import Index, search
from murf_fast.anomaly._patches import Patches
from murf_fast.anomaly.result import Anomaly
from murf_fast.anomaly.scoring import ScoringRules, mean_top, reweighted_score
from murf_fast.anomaly.sharded_index import ShardedIndex
from murf_fast.ops.gaussian_blur import gaussian_blur
from murf_fast.ops.nearest_distance import NearestIndex


def searched(
    of_image: Sequence[Patches], indices: Sequence[Index | None], rules: ScoringRules
) -> tuple[list[Tensor | None], list[float]]:
    """Per bank, a (1, 1, h, w) map of distances and, where the rules want them, PatchCore's image scores.

    None where the scale is left out: the bank is empty (its index is None), or no patch of the image counts.
    """
    maps: list[Tensor | None] = []
    weighted: list[float] = []
    for patches, index in zip(of_image, indices, strict=True):
        if patches.rows is None or not len(patches.rows) or index is None:
            maps.append(None)
            weighted.append(0.0)
            continue
        found, nearest = search(index, patches.rows, rules)
        distances = patches.rows.new_zeros(patches.grid[0] * patches.grid[1], dtype=torch.float32)
        distances[slice(None) if patches.kept is None else patches.kept] = rules.of_neighbors(found).float()
        maps.append(distances.view(1, 1, *patches.grid))
        reweighted = rules.image_score == "reweighted"
        own = cast("NearestIndex | ShardedIndex", index)  # the others are refused with these rules
        weighted.append(reweighted_score(patches.rows, found[:, 0], nearest[:, 0], own) if reweighted else 0.0)
    return maps, weighted


def anomaly(
    size: tuple[int, int],
    maps: Sequence[Tensor | None],
    weighted: Sequence[float],
    rules: ScoringRules,
    weights: Sequence[float] | None,
    device: torch.device,
    banks: Sequence[int] | None = None,
) -> Anomaly:
    """What the banks with these indices (None: all) say of an image of ``size``, by the rules.

    ``weights``: of every bank; None: all the same.
    """
    banks = range(len(maps)) if banks is None else banks
    banks = [i for i in banks if maps[i] is not None and (weights is None or weights[i])]
    if not banks:
        return Anomaly(torch.zeros(size, dtype=torch.float32, device=device), 0.0)
    those = [cast("Tensor", maps[i]) for i in banks]
    weights = weights and [weights[i] for i in banks]
    fused = rules.fused(those, size, weights)
    if rules.sigma:
        fused = gaussian_blur(fused, rules.sigma, border=rules.border)
    if rules.image_score == "reweighted":
        return Anomaly(fused[0, 0], rules.fused_numbers([weighted[i] for i in banks], weights))
    finest = max((m.shape[2:] for m in those), key=lambda grid: grid[0] * grid[1])
    patches = rules.fused(those, (finest[0], finest[1]), weights, mode="bilinear")
    score = float(patches.max()) if rules.image_score == "max" else mean_top(patches)
    return Anomaly(fused[0, 0], score)
