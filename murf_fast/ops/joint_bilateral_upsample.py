"""One level of a joint bilateral upsampler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from murf_fast.ops import _checks
from murf_fast.ops._bilateral import BilateralParams
from murf_fast.ops.adaptive_conv import adaptive_conv
from murf_fast.ops.bilateral_kernels import bilateral_kernels


def joint_bilateral_upsample(
    source: Tensor | Sequence[Tensor],
    guidance: Tensor,
    params: BilateralParams,
    *,
    radius: int = 3,
    mode: str = "bicubic",
    bias: Tensor | None = None,
    range_mask: Tensor | None = None,
    fixup_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | list[Tensor]:
    """Upsample ``source`` to the grid of ``guidance`` with kernels that follow the guidance's edges.

    ``adaptive_conv(source, bilateral_kernels(guidance, params), mode=mode, bias=bias)`` with float32 kernels. The two
    stay separate passes: the kernels are a small part of the output's size, and the backward needs them.

    Args:
        source: (B, C, h, w), or several such maps that share the guidance (the kernels are computed once).
        guidance: (B, G, H, W) at the output's size, in the dtype of the source; H, W > radius.
        params, radius, range_mask, fixup_mask: As for :func:`bilateral_kernels`.
        mode, bias, backend: As for :func:`adaptive_conv`.

    Returns:
        (B, C, H, W) per source, in its dtype and layout; a list if ``source`` is one.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: the results and the kernels, (B, D * D, H, W) in float32.

    Source: FeatUp (arXiv 2403.10516), ``JBULearnedRange``; FeatSharp, ``JBULevel`` (``mode="bilinear"``, no fix-up).
    """
    op = "joint_bilateral_upsample"
    sources = _checks.maps(op, source, same_channels=False, name="source")
    guidance = _checks.map_(op, "guidance", guidance)
    _checks.same_device_and_dtype(op, "guidance", guidance, "source", sources[0])
    if guidance.shape[0] != sources[0].shape[0]:
        raise ValueError(
            f"murf_fast.{op}: `guidance` must have the batch size of `source`, {sources[0].shape[0]}, "
            f"got {guidance.shape[0]}"
        )
    kernels = bilateral_kernels(
        guidance,
        params,
        radius=radius,
        range_mask=range_mask,
        fixup_mask=fixup_mask,
        dtype=None if guidance.dtype == torch.float64 else torch.float32,
        backend=backend,
    )
    results = [adaptive_conv(s, kernels, mode=mode, bias=bias, backend=backend) for s in sources]
    return results[0] if isinstance(source, Tensor) else results
