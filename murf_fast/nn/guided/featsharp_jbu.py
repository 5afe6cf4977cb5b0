"""FeatSharp's joint bilateral upsampler."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from murf_fast.nn.guided._jbu_levels import run_levels
from murf_fast.nn.guided.jbu_level import JBULevel
from murf_fast.ops import _checks


class FeatSharpJBU(nn.Module):
    """Upsamples by any integer factor: one level per prime factor, smallest first, ``ups.0``, ``ups.1``, ...

    Levels interpolate bilinearly, have no fix-up networks and no dropout. ``range_alpha`` and ``spatial_alpha`` are the
    original's; they scale kernels that are normalized afterwards and do nothing, and are kept so that its state dicts
    load and save.

    Args:
        factor: Factor of both sides, at least 1.
        guides: Channels of the guidance.

    Source: FeatSharp (arXiv 2502.16025), its ``JBUStack`` and ``JBULevel``.
    """

    def __init__(self, factor: int, *, guides: int = 3) -> None:
        super().__init__()
        factor = _checks.integer("FeatSharpJBU", "factor", factor, 1)
        self.factors = _prime_factors(factor)
        self.ups = nn.ModuleList(
            JBULevel(guides=guides, mode="bilinear", fixup=False, dropout=None) for _ in self.factors
        )
        for level in self.ups:
            for name in ("range_alpha", "spatial_alpha"):
                level.register_buffer(name, torch.tensor(0.0))

    def forward(self, source: Tensor, guidance: Tensor) -> Tensor:
        """(B, C, factor * h, factor * w) of a source (B, C, h, w) and a guidance (B, guides, H, W) of any size.

        FeatSharp resizes the guidance to the output's size first, bilinearly; every level averages it to its own.
        """
        source = _checks.map_("FeatSharpJBU", "source", source)
        named = [(f"ups.{i}", level) for i, level in enumerate(self.ups)]
        return run_levels("FeatSharpJBU", named, self.factors, [source], guidance, mode="bilinear")[0]

    def extra_repr(self) -> str:
        return f"factors={self.factors}"


def _prime_factors(n: int) -> list[int]:
    factors, divisor = [], 2
    while n > 1:
        while n % divisor == 0:
            factors.append(divisor)
            n //= divisor
        divisor += 1
    return factors
