"""A score map smoothed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from inputs import CL, randn
from registry import Contenders, case, configurations, side, smallest
from tiny import PLANAR, SIZE, maps

import murf_fast


@case("gaussian_blur", "score map 1536 x 3348, sigma 4")
def blur(device, dtype):
    x = randn(device, dtype, 1, 1, side(1536), side(3348))
    taps = torch.exp(-0.5 * (torch.arange(-16, 17, device=device, dtype=torch.float64) / 4) ** 2)
    taps = taps / taps.sum()

    def dense(x):
        kernel = torch.outer(taps, taps).to(x.dtype)[None, None]
        return F.conv2d(F.pad(x, (16,) * 4, mode="reflect"), kernel)

    def separable(x):
        line = taps.to(x.dtype)[None, None]
        return F.conv2d(F.conv2d(F.pad(x, (16,) * 4, mode="reflect"), line[:, :, :, None]), line[:, :, None, :])

    def oracle():
        yield (), separable(x.double())

    return Contenders(
        lambda: murf_fast.gaussian_blur(x, 4.0, border="reflect"),
        {"eager separable": lambda: separable(x), "dense 33 x 33": lambda: dense(x)},
        oracle,
        x.numel() * x.element_size(),
    )


@smallest("gaussian_blur")
def tiny(device: str) -> None:
    murf_fast.gaussian_blur(maps(device)[0], sigma=1.0)


@configurations("gaussian_blur")
def shapes(device: str, dtype: torch.dtype) -> None:
    for layout in (CL, PLANAR):
        x = torch.zeros(1, 19, *SIZE, device=device, dtype=dtype).contiguous(memory_format=layout)
        for sigma in (4.0, 20.0):  # the latter's taps are summed in parts
            murf_fast.gaussian_blur(x, sigma)
