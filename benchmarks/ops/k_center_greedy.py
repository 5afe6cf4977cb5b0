"""A coreset."""

from __future__ import annotations

import torch
from inputs import features
from registry import Contenders, Target, case, classes, configurations, side, smallest
from torch import Tensor

import murf_fast


@case("k_center_greedy", "1 % of 100k x 384", targets=(Target("eager", 3.0),), capturable=False)
def k_center(device, dtype):
    rows = features(device, dtype, side(100_000), classes(384))
    count = max(2, len(rows) // 100)

    def greedy(x: Tensor) -> Tensor:
        chosen, nearest = [0], torch.full((len(x),), torch.inf, device=device, dtype=x.dtype)
        for _ in range(count - 1):
            nearest = torch.minimum(nearest, torch.linalg.norm(x - x[chosen[-1]], dim=1))
            chosen.append(int(nearest.argmax()))
        return torch.tensor(chosen, device=device).float()  # exact, as all indices below 2^24

    def oracle():
        yield (), greedy(rows.double())

    return Contenders(
        lambda: murf_fast.k_center_greedy(rows, count=count).float(),
        {"eager": lambda: greedy(rows)},
        oracle,
        rows.numel() * rows.element_size(),
    )


@smallest("k_center_greedy")
def tiny(device: str) -> None:
    murf_fast.k_center_greedy(torch.randn(37, 19, device=device), count=5)


@configurations("k_center_greedy")
def shapes(device: str, dtype: torch.dtype) -> None:
    """The width is a constant of the kernel: the narrowest, and that of ViT-B."""
    for width in (64, 768):
        murf_fast.k_center_greedy(torch.ones(300, width, device=device, dtype=dtype), count=2)
