"""A kernel per pixel applied to a doubled map."""

from __future__ import annotations

import torch
from bilateral import channel_blocks, jbu_params, shifted, tiny_bilateral
from inputs import CL, compiled, guidance_of, randn
from registry import Contenders, Target, case, classes, configurations, side, smallest
from tiny import PLANAR, backward

import murf_fast


@case("adaptive_conv", "768 channels, 224 -> 448, 7 x 7 kernels, bicubic", targets=(Target("eager shifted", 10.0),))
def jbu_conv(device, dtype):
    n = side(224)
    source = randn(device, dtype, 1, classes(768), n, n, memory_format=CL)
    planar = source.contiguous()
    kernels = murf_fast.bilateral_kernels(guidance_of(device, dtype, (2 * n, 2 * n)), jbu_params(device, dtype))
    taps_first = kernels.contiguous()

    def oracle():
        exact = kernels.double()
        for where, block in channel_blocks(source):
            yield where, shifted(block, exact)

    return Contenders(
        lambda: murf_fast.adaptive_conv(source, kernels),
        {
            "eager shifted channels_last": lambda: shifted(source, kernels),
            "eager shifted contiguous": lambda: shifted(planar, taps_first),
            "compile shifted": compiled(shifted, planar, taps_first),
        },
        oracle,
        source.shape[1] * 4 * n * n * source.element_size(),
        operations=2 * 49 * source.shape[1] * 4 * n * n,
    )


@smallest("adaptive_conv")
def tiny(device: str) -> None:
    tiny_bilateral(device, lambda s, g, _: murf_fast.adaptive_conv(s, g.repeat(1, 3, 1, 1), mode="bicubic"))


@configurations("adaptive_conv")
def shapes(device: str, dtype: torch.dtype) -> None:
    """FeatUp's doubling and its own function; planar maps, SimFeatUp's radius and FeatSharp's tripling."""
    cases = [(CL, 3, 2, "bicubic"), (CL, 3, 1, None)]
    if dtype == torch.float32:  # what the rest changes does not depend on the dtype
        cases += [(PLANAR, 3, 2, "bicubic"), (PLANAR, 3, 1, None), (CL, 5, 2, "bicubic"), (CL, 3, 3, "bilinear")]
    for layout, radius, factor, mode in cases:
        n, padding = (12, "reflect") if mode else (12 + 2 * radius, None)
        source = torch.zeros(2, 384, n, n, device=device, dtype=dtype).contiguous(memory_format=layout)
        # A doubling's kernels are float32, as `bilateral_kernels` makes them for float32 guidance.
        kernels = torch.zeros(
            2, (2 * radius + 1) ** 2, 12 * factor, 12 * factor, device=device, dtype=torch.float32 if mode else dtype
        ).contiguous(memory_format=CL)
        leaves, options = (source.requires_grad_(), kernels.requires_grad_()), {"mode": mode, "padding": padding}
        backward(murf_fast.adaptive_conv(*leaves, bias=torch.zeros(384, device=device), **options))
        murf_fast.adaptive_conv(source.detach(), kernels.detach(), **options)
