"""One level of a joint bilateral upsampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast.annotations import Backend, SmoothMode
from murf_fast.ops import _checks, _contract
from murf_fast.ops._bilateral import BilateralParams, check_masks, check_params, require_network
from murf_fast.ops._derivatives import derivatives_wanted
from murf_fast.ops._library import as_float32, empty_map, layout_of, register, wants_channels_last
from murf_fast.ops.adaptive_conv import MODES, adaptive_conv
from murf_fast.ops.bilateral_kernels import bilateral_kernels
from murf_fast.tables.folded import folded_axis, part


@overload
def joint_bilateral_upsample(
    source: Tensor,
    guidance: Tensor,
    params: BilateralParams,
    *,
    radius: int = 3,
    mode: SmoothMode = "bicubic",
    bias: Tensor | None = None,
    range_mask: Tensor | None = None,
    fixup_mask: Tensor | None = None,
    rows: tuple[int, int] | None = None,
    memory_format: torch.memory_format | None = None,
    backend: Backend | None = None,
) -> Tensor: ...
@overload
def joint_bilateral_upsample(
    source: Sequence[Tensor],
    guidance: Tensor,
    params: BilateralParams,
    *,
    radius: int = 3,
    mode: SmoothMode = "bicubic",
    bias: Tensor | None = None,
    range_mask: Tensor | None = None,
    fixup_mask: Tensor | None = None,
    rows: tuple[int, int] | None = None,
    memory_format: torch.memory_format | None = None,
    backend: Backend | None = None,
) -> list[Tensor]: ...
def joint_bilateral_upsample(
    source: Tensor | Sequence[Tensor],
    guidance: Tensor,
    params: BilateralParams,
    *,
    radius: int = 3,
    mode: SmoothMode = "bicubic",
    bias: Tensor | None = None,
    range_mask: Tensor | None = None,
    fixup_mask: Tensor | None = None,
    rows: tuple[int, int] | None = None,
    memory_format: torch.memory_format | None = None,
    backend: Backend | None = None,
) -> Tensor | list[Tensor]:
    """Upsample ``source`` to the grid of ``guidance`` with kernels that follow the guidance's edges.

    ``adaptive_conv(source, bilateral_kernels(guidance, params), mode=mode, bias=bias)`` with float32 kernels. Where
    gradients are needed these are two passes, as the backward needs the kernels; else they are computed and applied in
    bands of rows.

    Args:
        source: (B, C, h, w), or several such maps that share the guidance (the kernels are computed once).
        guidance: (B, G, H, W) at the output's size, in the dtype of the source or float32; H, W > radius.
        params, radius, range_mask, fixup_mask: As for :func:`bilateral_kernels`.
        rows: (begin, end) of the result's rows that are wanted; None: all. Where gradients are needed all are made.
        mode, bias, memory_format, backend: As for :func:`adaptive_conv`.

    Returns:
        (B, C, H, W) per source (``end - begin`` in place of H), in its dtype and layout; a list if ``source`` is one.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: the results, and kernels: with gradients (B, D * D, H, W) in float32, without on the CPU 16 MiB or sixteen
    rows per thread of them, on CUDA bands of 32 MiB.

    Source: FeatUp (arXiv 2403.10516), ``JBULearnedRange``; FeatSharp, ``JBULevel`` (``mode="bilinear"``, no fix-up).
    """
    op = "joint_bilateral_upsample"
    sources = _checks.maps(op, source, same_channels=False, name="source")
    guidance = _checks.map_(op, "guidance", guidance)
    first = sources[0]
    _checks.companion(op, "guidance", guidance, "source", first)
    radius = _checks.integer(op, "radius", radius, 0)
    tensors = check_params(op, params, guidance, radius)
    check_masks(op, params, guidance, radius, range_mask, fixup_mask)
    _checks.choice(op, "mode", mode, MODES)
    if bias is not None:
        for i, s in enumerate(sources):
            _checks.vector(op, "bias", bias, s.shape[1], s, what=f"one entry per channel of `source[{i}]`")
    height = guidance.shape[2]
    begin, end = (0, height) if rows is None else _checks.span(op, "rows", rows, height)
    channels_last = [wants_channels_last(op, memory_format, s) for s in sources]
    chosen = _checks.backend(backend, first)
    inputs = (*sources, guidance, *tensors, bias, range_mask, fixup_mask)
    if chosen != "reference" and not derivatives_wanted(inputs):
        results = _joint_bilateral_upsample(
            sources, guidance, tensors, range_mask, fixup_mask, bias, [begin, end], radius, mode, channels_last, chosen
        )
        return results[0] if isinstance(source, Tensor) else results
    kernels = bilateral_kernels(
        guidance,
        params,
        radius=radius,
        range_mask=range_mask,
        fixup_mask=fixup_mask,
        dtype=None if guidance.dtype == torch.float64 else torch.float32,
        backend=backend,
    )
    results = [
        adaptive_conv(s, kernels, mode=mode, bias=bias, memory_format=memory_format, backend=backend) for s in sources
    ]
    if rows is not None:
        results = [
            r[:, :, begin:end].contiguous(memory_format=layout_of(last))
            for r, last in zip(results, channels_last, strict=True)
        ]
    return results[0] if isinstance(source, Tensor) else results


def _requires(
    op, sources, guidance, params, range_mask, fixup_mask, bias, rows, radius, mode, channels_last, backend
) -> None:
    _contract.maps(op, sources, same_channels=False, name="sources")
    first = sources[0]
    _contract.backend(op, backend, first)
    require_network(op, guidance, params, range_mask, fixup_mask, radius)
    dtypes = (first.dtype, torch.float32)
    _contract.tensor(op, "guidance", guidance, first, (first.shape[0], None, None, None), dtypes)
    _contract.one_of(op, "interpolation", mode, MODES)
    _contract.count(op, "channels_last", channels_last, len(sources))
    _contract.count(op, "span", rows, 2)
    if not 0 <= rows[0] < rows[1] <= guidance.shape[2]:
        raise ValueError(f"murf_fast.{op}: `span` must lie within {guidance.shape[2]} rows, got {tuple(rows)}")
    if bias is not None:
        for source in sources:
            _contract.tensor(op, "bias", bias, first, (source.shape[1],), _checks.DTYPES)


def _empty(
    sources, guidance, params, range_mask, fixup_mask, bias, rows, radius, mode, channels_last, backend
) -> list[Tensor]:
    size = (rows[1] - rows[0], guidance.shape[3])
    return [empty_map(s, (*s.shape[:2], *size), last) for s, last in zip(sources, channels_last, strict=True)]


def _launch(
    sources, guidance, params, range_mask, fixup_mask, bias, rows, radius, mode, channels_last, backend, outs
) -> None:
    size, taps = guidance.shape[2:], 2 * radius + 1
    axes = []
    for s in sources:
        y, x = (folded_axis(n, m, taps, mode, "reflect") for n, m in zip(s.shape[2:], size, strict=True))
        axes.append((part(y, *rows), x))
    backends.launcher(backend).joint_bilateral_upsample(
        sources, guidance, params, range_mask, fixup_mask, rows[0], radius, as_float32(bias), axes, outs
    )


def _reference(
    sources, guidance, params, range_mask, fixup_mask, bias, rows, radius, mode, channels_last, backend
) -> list[Tensor]:
    kernels = reference.bilateral_kernels(guidance, params, radius, range_mask, fixup_mask)
    size, (begin, end) = tuple(guidance.shape[2:]), rows
    maps = [reference.adaptive_conv(s, kernels, size, bias, mode)[:, :, begin:end] for s in sources]
    return [m.contiguous(memory_format=layout_of(last)) for m, last in zip(maps, channels_last, strict=True)]


_joint_bilateral_upsample = register(
    "joint_bilateral_upsample(Tensor[] sources, Tensor guidance, Tensor[] params, Tensor? range_mask, "
    "Tensor? fixup_mask, Tensor? bias, SymInt[] span, int radius, str interpolation, bool[] channels_last, "
    "str backend) -> Tensor[]",
    _requires,
    _empty,
    _launch,
    reference=_reference,
    checked=True,
)
