"""One filter kernel per pixel, predicted from a guidance image."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast.annotations import Backend
from murf_fast.ops import _checks, _contract
from murf_fast.ops._bilateral import BilateralParams, check_masks, check_params, require_network
from murf_fast.ops._derivatives import reference_second_derivative
from murf_fast.ops._dtypes import BY_NAME, NAMES
from murf_fast.ops._library import empty_map, register


def bilateral_kernels(
    guidance: Tensor,
    params: BilateralParams,
    *,
    radius: int = 3,
    range_mask: Tensor | None = None,
    fixup_mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Joint bilateral kernels of every pixel of ``guidance``, D x D taps with D = 2 * radius + 1.

    With ``p = W1 gelu(W0 g + b0) + b1`` per pixel, taps ``t = (i, j)`` and reflected borders::

        R_t = softmax_t(clamp(exp(range_temp), 1e-4, 1e4) * <p[y + i - r, x + j - r], p[y, x]>)
        S_t = exp(-(d_i^2 + d_j^2) / (2 sigma_spatial^2)),    d = linspace(-1, 1, D)
        K   = R S / max(sum_t R S, 1e-7)
        K  += 0.1 * (V1 gelu(V0 [K, g] + c0) + c1)             # fix-up; absent in FeatSharp

    After the fix-up kernels neither sum to one nor stay positive. Differentiable in ``guidance`` and every parameter.

    Args:
        guidance: (B, G, H, W), floating point, any strides; H, W > radius.
        params: The networks; any floating dtype, used in float32.
        radius: Half the kernel's width.
        range_mask, fixup_mask: (B, K) and (B, P) factors of the hidden channels, for dropout; None means 1.
        dtype: Of the result: that of the guidance (default) or float32.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None chooses from the device.

    Returns:
        (B, D * D, H, W), channels_last: the taps of a pixel are consecutive.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: the result, and D projected rows per thread (on CUDA a band of at most 32 MiB). The backward holds one more
    tensor of the result's size, and on CUDA the projection and two gradients of it, (B, K, H, W) in float32 each.

    Source: FeatUp (arXiv 2403.10516), ``JBULearnedRange``.
    """
    op = "bilateral_kernels"
    guidance = _checks.map_(op, "guidance", guidance)
    radius = _checks.integer(op, "radius", radius, 0)
    tensors = check_params(op, params, guidance, radius)
    check_masks(op, params, guidance, radius, range_mask, fixup_mask)
    if dtype not in (None, guidance.dtype, torch.float32):
        raise TypeError(f"murf_fast.{op}: `dtype` must be {guidance.dtype} or torch.float32, got {dtype}")
    dtype = dtype or guidance.dtype
    backend = _checks.backend(backend, guidance)
    if backend == "reference":
        return _reference(guidance, tensors, range_mask, fixup_mask, radius, NAMES[dtype], backend)
    return _bilateral_kernels(guidance, tensors, range_mask, fixup_mask, radius, NAMES[dtype], backend)


def _requires(op, guidance, params, range_mask, fixup_mask, radius, dtype, backend) -> None:
    require_network(op, guidance, params, range_mask, fixup_mask, radius)
    _contract.backend(op, backend, guidance)
    _contract.one_of(op, "kernels_dtype", dtype, (NAMES[guidance.dtype], "float32"))


def _empty(guidance, params, range_mask, fixup_mask, radius, dtype, backend) -> Tensor:
    return empty_map(guidance, _shape(guidance, radius), True, BY_NAME[dtype])


def _shape(guidance, radius) -> tuple[int, ...]:
    return guidance.shape[0], (2 * radius + 1) ** 2, *guidance.shape[2:]


def _launch(guidance, params, range_mask, fixup_mask, radius, dtype, backend, out) -> None:
    backends.launcher(backend).bilateral_kernels(guidance, params, range_mask, fixup_mask, radius, out)


def _reference(guidance, params, range_mask, fixup_mask, radius, dtype, backend) -> Tensor:
    result = reference.bilateral_kernels(guidance, params, radius, range_mask, fixup_mask).to(BY_NAME[dtype])
    return result.contiguous(memory_format=torch.channels_last)


def _backward(wanted, arguments, grad):
    guidance, params, range_mask, fixup_mask, radius, _, backend = arguments
    of_guidance, packed = _gradient(grad, guidance, params, range_mask, fixup_mask, radius, backend)
    return of_guidance, _unpacked(packed, params)


def _gradient_requires(op, grad, guidance, params, range_mask, fixup_mask, radius, backend) -> None:
    require_network(op, guidance, params, range_mask, fixup_mask, radius)
    _contract.backend(op, backend, guidance)
    _contract.tensor(op, "grad", grad, guidance, _shape(guidance, radius), (guidance.dtype, torch.float32))


def _gradient_empty(grad, guidance, params, range_mask, fixup_mask, radius, backend) -> tuple[Tensor, Tensor]:
    total = sum(p.numel() for p in params)
    return torch.empty_like(guidance), guidance.new_empty(total, dtype=torch.float32)


def _gradient_launch(grad, guidance, params, range_mask, fixup_mask, radius, backend, results) -> None:
    made = backends.launcher(backend).bilateral_kernels_backward(grad, guidance, params, range_mask, fixup_mask, radius)
    for result, gradient in zip(results, made, strict=True):
        result.copy_(gradient)


def _gradient_backward(_, arguments, of_guidance, of_packed):
    grad, guidance, params, range_mask, fixup_mask, radius, _ = arguments
    directions = [of_guidance, *_unpacked(of_packed, params)]

    def kernels(guidance: Tensor, *params: Tensor) -> Tensor:
        return reference.bilateral_kernels(guidance, params, radius, range_mask, fixup_mask)

    (of_grad,), (of_guidance, *of_params) = reference_second_derivative(
        kernels, [guidance, *params], [grad], directions, [True] * len(directions)
    )
    return of_grad, of_guidance, of_params


def _unpacked(packed: Tensor, params: list[Tensor]) -> list[Tensor]:
    """Gradients of the parameters, which come one behind the other."""
    pieces = packed.split([p.numel() for p in params])
    return [g.view(p.shape).to(p.dtype) for g, p in zip(pieces, params, strict=True)]


_bilateral_kernels = register(
    "bilateral_kernels(Tensor guidance, Tensor[] params, Tensor? range_mask, Tensor? fixup_mask, int radius, "
    "str kernels_dtype, str backend) -> Tensor",
    _requires,
    _empty,
    _launch,
    _backward,
    reference=_reference,
    checked=True,
)
_gradient = register(
    "bilateral_kernels_backward(Tensor grad, Tensor guidance, Tensor[] params, Tensor? range_mask, Tensor? fixup_mask, "
    "int radius, str backend) -> (Tensor, Tensor)",
    _gradient_requires,
    _gradient_empty,
    _gradient_launch,
    _gradient_backward,
)
