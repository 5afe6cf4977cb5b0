"""A kernel per pixel applied to a doubled map."""

from __future__ import annotations

from bilateral import channel_blocks, jbu_params, shifted, tiny_bilateral
from inputs import CL, compiled, guidance_of, randn
from registry import Contenders, Target, case, classes, side, smallest

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
