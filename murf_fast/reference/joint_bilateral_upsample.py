from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from murf_fast.annotations import SmoothMode
from murf_fast.reference.adaptive_conv import adaptive_conv
from murf_fast.reference.bilateral_kernels import bilateral_kernels

__all__ = ["joint_bilateral_upsample"]


def joint_bilateral_upsample(
    source: Tensor,
    guidance: Tensor,
    params: Sequence[Tensor],
    radius: int = 3,
    mode: SmoothMode = "bicubic",
    bias: Tensor | None = None,
) -> Tensor:
    """One level: the kernels of the guidance, applied to the source resized to the guidance's grid."""
    return adaptive_conv(source, bilateral_kernels(guidance, params, radius), guidance.shape[2:], bias, mode)
