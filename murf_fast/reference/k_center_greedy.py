from __future__ import annotations

import torch
from torch import Tensor

ROWS = 1024  # in one go: differences of all rows would be as large as the features


def k_center_greedy(features: Tensor, count: int, start: Tensor) -> Tensor:
    """``start``, then always the row that is farthest from the nearest of those before; the lowest among equals."""
    features = features if features.dtype == torch.float64 else features.float()
    centers = start.tolist()
    nearest = torch.full((len(features),), torch.inf, dtype=features.dtype, device=features.device)
    for step in range(count - 1):
        center = features[centers[step]]
        for some, rows in zip(nearest.split(ROWS), features.split(ROWS), strict=True):
            torch.minimum(some, (rows - center).square().sum(1), out=some)
        if step + 1 == len(centers):
            centers.append(int(nearest.argmax()))
    return torch.tensor(centers, dtype=torch.int64, device=features.device)
