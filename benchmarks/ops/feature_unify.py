"""AnyUp's filter bank on many channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from inputs import compiled, randn
from registry import Contenders, Target, case, classes, configurations, side, smallest
from tiny import backward, differentiated

import murf_fast


@case(
    "feature_unify",
    "1024 channels of 64^2, 128 filters of 5 x 5",
    targets=(Target("grouped", 3.0),),
    memory_target=(0.05, "responses"),
)
def unify(device, dtype):
    channels, n, filters = classes(1024), max(side(64), 3), 128
    features = randn(device, dtype, 1, channels, n, n)
    basis = randn(device, dtype, filters, 1, 5, 5)

    def plain(features, basis):
        c = features.shape[1]
        inside = F.conv2d(torch.ones_like(features[:, :1]), torch.ones_like(basis[:1]), padding=2)
        responses = F.conv2d(features, basis.repeat(c, 1, 1, 1), padding=2, groups=c) / inside
        return responses.view(1, filters, c, n, n).softmax(1).mean(2)

    def oracle():
        yield (), plain(features.double(), basis.double())

    return Contenders(
        lambda: murf_fast.feature_unify(features, basis),
        {"grouped convolution": lambda: plain(features, basis), "compile": compiled(plain, features, basis)},
        oracle,
        channels * filters * n * n * features.element_size(),
        operations=2 * channels * filters * 25 * n * n,
    )


@smallest("feature_unify")
def tiny(device: str) -> None:
    differentiated(device, lambda m: murf_fast.feature_unify(m[0], torch.randn(8, 1, 3, 3, device=device)))


@configurations("feature_unify")
def shapes(device: str, dtype: torch.dtype) -> None:
    """AnyUp's filters for a ViT-S, for its paper's 50 channels, and for more channels than are summed at once."""
    basis = torch.zeros(128, 1, 5, 5, device=device, requires_grad=True)
    for channels, variant in ((384, "released"), (384, "paper"), (50, "released"), (8192, "released")):
        features = torch.zeros(1, channels, 3, 4, device=device, dtype=dtype, requires_grad=True)
        backward(murf_fast.feature_unify(features, basis, variant))
