from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nearest_distance"]


def nearest_distance(query: Tensor, bank: Tensor, k: int = 1, metric: str = "l2") -> tuple[Tensor, Tensor]:
    """The k smallest ``|q - b|``, ``|q - b|^2`` or ``1 - cos(q, b)``, or largest ``q.b``, and their rows; equal ones by
    rising row.
    """
    dtype = torch.float64 if torch.float64 in (query.dtype, bank.dtype) else torch.float32
    query, bank = query.to(dtype), bank.to(dtype)
    if metric == "cosine":
        query, bank = _unit(query), _unit(bank)
    distances, indices = query.new_zeros(len(query), k), query.new_zeros(len(query), k, dtype=torch.int64)
    for i, q in enumerate(query):
        if metric == "ip":
            values, order = (bank * q).sum(1).sort(stable=True, descending=True)
        else:
            values, order = (bank - q).square().sum(1).sort(stable=True)
        distances[i], indices[i] = values[:k], order[:k]
    if metric == "l2":
        distances = distances.sqrt()
    if metric == "cosine":
        distances = distances / 2
    return distances, indices


def _unit(x: Tensor) -> Tensor:
    """Rows of norm one; divided by their largest entry first, as squares of tiny entries are zero."""
    x = x / x.abs().amax(1, keepdim=True)
    return x / x.square().sum(1, keepdim=True).sqrt()
