from __future__ import annotations

import torch
from torch import Tensor


def k_center_greedy(features: Tensor, count: int, start: Tensor) -> Tensor:
    """``start``, then always the row that is farthest from the nearest of those before; the lowest among equals."""
    features = features if features.dtype == torch.float64 else features.float()
    centers = start.tolist()
    nearest = torch.full((len(features),), torch.inf, dtype=features.dtype, device=features.device)
    for step in range(count - 1):
        nearest = torch.minimum(nearest, (features - features[centers[step]]).square().sum(1))
        if step + 1 == len(centers):
            centers.append(int(nearest.argmax()))
    return torch.tensor(centers, dtype=torch.int64, device=features.device)
