from __future__ import annotations

import torch
from torch import Tensor

from murf_fast.reference._meet import meet

__all__ = ["k_center_greedy"]


def k_center_greedy(features: Tensor, count: int, start: Tensor, nearest: Tensor | None = None, met: int = 0) -> Tensor:
    """``start``, then always the row that is farthest from the nearest of those before; the lowest among equals.

    ``nearest`` (N,), updated: squared distances to the nearest of the first ``met``; None: of none.
    """
    features = features if features.dtype == torch.float64 else features.float()
    centers = start.tolist()
    if nearest is None:
        nearest = torch.full((len(features),), torch.inf, dtype=features.dtype, device=features.device)
    for step in range(met, count - 1):
        meet(features, features[centers[step]], nearest)
        if step + 1 == len(centers):
            centers.append(int(nearest.argmax()))
    return torch.tensor(centers, dtype=torch.int64, device=features.device)
