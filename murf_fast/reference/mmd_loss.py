from __future__ import annotations

import torch
from torch import Tensor

from murf_fast.reference._pairs import squared_distances

__all__ = ["mmd_loss"]


def mmd_loss(features: Tensor, upsampled: Tensor, gamma: float | None = None) -> Tensor:
    """The unbiased squared MMD of the places of two maps, from three matrices of ``k = exp(-gamma |a - b|^2)``.

    ``gamma`` None is one by the median squared distance of two places of ``features``, 0 where that is 0.
    """
    dtype = torch.promote_types(torch.promote_types(features.dtype, upsampled.dtype), torch.float32)
    x, y = (t.to(dtype).flatten(2).mT for t in (features, upsampled))
    m, n = x.shape[1], y.shape[1]
    within_x, within_y, between = squared_distances(x, x), squared_distances(y, y), squared_distances(x, y)
    if gamma is None:
        first, second = torch.triu_indices(m, m, 1, device=x.device)
        median = within_x.detach()[:, first, second].median(1).values
        gamma = torch.where(median > 0, 1 / median, 0)[:, None, None]
    same_x, same_y = (torch.eye(size, dtype=torch.bool, device=x.device) for size in (m, n))
    of_x = (-gamma * within_x).exp().masked_fill(same_x, 0).sum((1, 2)) / (m * (m - 1))
    of_y = (-gamma * within_y).exp().masked_fill(same_y, 0).sum((1, 2)) / (n * (n - 1))
    return (of_x + of_y - 2 * (-gamma * between).exp().mean((1, 2))).mean()
