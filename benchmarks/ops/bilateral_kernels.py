"""The kernels of one level of FeatUp's upsampler."""

from __future__ import annotations

import torch
from bilateral import jbu_params, tiny_bilateral
from inputs import compiled, guidance_of
from registry import Contenders, case, configurations, side, smallest
from tiny import backward

import murf_fast


@case("bilateral_kernels", "7 x 7 kernels of a guidance of 448 x 448")
def jbu_kernels(device, dtype):
    guidance, params = guidance_of(device, dtype, (side(448), side(448))), jbu_params(device, dtype)

    def plain(guidance, *params):
        return murf_fast.reference.bilateral_kernels(guidance, params)

    def oracle():
        yield (), plain(guidance.double(), *(p.double() for p in params))

    others = {"eager": lambda: plain(guidance, *params)}
    if device == "cuda":
        others["compile"] = compiled(plain, guidance, *params)
    pixels = guidance.shape[2] * guidance.shape[3]
    return Contenders(
        lambda: murf_fast.bilateral_kernels(guidance, params),
        others,
        oracle,
        49 * pixels * guidance.element_size(),
        operations=2 * pixels * (32 * (3 + 32) + 49 * 32 + 49 * (52 + 49)),
    )


@smallest("bilateral_kernels")
def tiny(device: str) -> None:
    tiny_bilateral(device, lambda _, g, p: murf_fast.bilateral_kernels(g, p, radius=1))


@configurations("bilateral_kernels")
def shapes(device: str, dtype: torch.dtype) -> None:
    """FeatUp's level, FeatSharp's without a fix-up, SimFeatUp's radius; and FeatUp's with dropout."""
    guidance = torch.zeros(2, 3, 24, 24, device=device, dtype=dtype)
    for radius, fixup in ((3, True), (3, False), (5, True)):
        params = jbu_params(device, torch.float32, radius)
        if not fixup:
            params = params._replace(fixup_weight0=None, fixup_bias0=None, fixup_weight1=None, fixup_bias1=None)
        params = params._replace(range_temp=params.range_temp.requires_grad_())
        backward(murf_fast.bilateral_kernels(guidance, params, radius=radius))
    masks = {"range_mask": torch.ones(2, 32, device=device), "fixup_mask": torch.ones(2, 49, device=device)}
    murf_fast.bilateral_kernels(guidance, jbu_params(device, dtype), **masks)
