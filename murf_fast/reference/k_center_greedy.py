from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["k_center_greedy"]

# Differences in one go: those of all rows would be as large as the features. On a CPU they stay in its caches, which is
# 1.8 times as fast; elsewhere few and large calls are.
VALUES_CPU, VALUES = 1 << 16, 1 << 22


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


def meet(features: Tensor, center: Tensor, nearest: Tensor) -> None:
    """Takes the squared distances to ``center`` (D,) into ``nearest`` (N,)."""
    step_rows = max(1, (VALUES_CPU if features.is_cpu else VALUES) // max(1, features.shape[1]))
    for some, rows in zip(nearest.split(step_rows), features.split(step_rows), strict=True):
        torch.minimum(some, (rows - center).square().sum(1), out=some)
