"""Expected value per pixel of a distribution over channels: the depth head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast.ops import _checks
from murf_fast.ops._derivatives import reference_second_derivative
from murf_fast.ops._library import axes_of_maps, empty_map, float32_rows, register

NORMS = ("softmax", "linear")


def upsample_expectation(
    features: Sequence[Tensor],
    size: int | tuple[int, int],
    values: Tensor,
    *,
    bias: Tensor | None = None,
    norm: str = "softmax",
    mode: str = "bilinear",
    antialias: bool = False,
    via: int | tuple[int, int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Make a distribution over channels from the summed, resized logits of every pixel and take its expectation.

    ``out = sum_k p_k values_k``, ``p = softmax(z)`` or ``p = (relu(z) + 0.1) / sum_k (relu(z_k) + 0.1)``,
    ``z = sum_s U_s F_s + bias``.

    Args:
        features: Maps of logits (B, K, h_s, w_s), floating point, one batch size, bin count, device and dtype.
        size: (height, width) of the result in pixels; one integer means a square.
        values: (K,), the value of every bin, floating point (metres, for a depth head).
        bias: (K,), or (B, K) for a bias per image.
        norm: ``"softmax"`` or ``"linear"`` (relu + 0.1, normalized).
        mode, antialias, via, backend: As for :func:`upsample_concat`.

    Returns:
        (B, height, width) in the promoted dtype of features and values: float32 values keep float32 results with half
        features, float64 values are for float64 arithmetic. Differentiable with respect to features, bias and values.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        BackendUnavailableError: ``backend`` cannot take this call.

    Memory: the result, and a few low-resolution rows per thread. Backward: float32 gradients of the low-resolution maps
    and, when ``values`` wants a gradient, K numbers per output row.

    Source: MuRF's depth head (``norm_strategy`` nonlinear and linear), DINOv2's ``BNHead`` (linear).
    """
    op = "upsample_expectation"
    features = _checks.maps(op, features, same_channels=True)
    size, via = _checks.grid(op, "size", size), _checks.optional_grid(op, "via", via)
    _checks.mode(op, mode, antialias)
    _checks.bias(op, bias, features)
    _checks.vector(op, "values", values, features[0].shape[1], features[0], what="one value per channel")
    _checks.choice(op, "norm", norm, NORMS)
    dtype = torch.promote_types(features[0].dtype, values.dtype)
    backend = backends.resolve(backend, features[0].device.type, dtype)
    if backend == "reference":
        wide = [f.to(torch.promote_types(dtype, torch.float32)) for f in features]
        return reference.upsample_expectation(wide, size, values, bias, norm, mode, antialias, via).to(dtype)
    result = torch.ops.murf_fast.upsample_expectation(
        features, bias, values, size, norm == "softmax", mode, antialias, via, backend
    )
    return result.to(dtype)


def _forward(features, bias, values, size, softmax, mode, antialias, via, backend) -> Tensor:
    out = _fake(features, bias, values, size, softmax, mode, antialias, via, backend)
    if out.numel():
        axes = axes_of_maps(features, size, mode, antialias, via)
        table = values.to(torch.float32).contiguous()
        backends.launcher(backend).upsample_expectation(features, axes, float32_rows(bias), table, softmax, out)
    return out


def _fake(features, bias, values, size, softmax, mode, antialias, via, backend) -> Tensor:
    return features[0].new_empty((features[0].shape[0], *size), dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    features, bias, values, _, ctx.softmax, ctx.mode, ctx.antialias, ctx.via, ctx.backend = inputs
    ctx.save_for_backward(bias, values, *features)


def _backward(ctx, grad):
    bias, values, *features = ctx.saved_tensors
    *gradients, row_sums = torch.ops.murf_fast.upsample_expectation_backward(
        grad,
        features,
        bias,
        values,
        ctx.softmax,
        ctx.mode,
        ctx.antialias,
        ctx.via,
        ctx.needs_input_grad[2],
        ctx.backend,
    )
    grad_features = [
        g.to(f.dtype) if needed else None
        for g, f, needed in zip(gradients, features, ctx.needs_input_grad[0], strict=True)
    ]
    grad_bias = bias_gradient(gradients[0], bias) if ctx.needs_input_grad[1] else None
    grad_values = row_sums.sum(0).to(values.dtype) if ctx.needs_input_grad[2] else None
    return grad_features, grad_bias, grad_values, None, None, None, None, None, None


def bias_gradient(gradient: Tensor, bias: Tensor) -> Tensor:
    """Gradient of a bias from that of any one map: the rows of a resize sum to one, so both have the same sum."""
    return gradient.sum((0, 2, 3) if bias.ndim == 1 else (2, 3)).to(bias.dtype)


def _gradients(grad, features, bias, values, softmax, mode, antialias, via, values_gradient, backend) -> list[Tensor]:
    gradients = [empty_map(f, f.shape, True, torch.float32) for f in features]
    rows = grad.shape[0] * grad.shape[1] if values_gradient else 0
    row_sums = grad.new_zeros((rows, features[0].shape[1]), dtype=torch.float32)
    if grad.numel():
        axes = axes_of_maps(features, grad.shape[1:], mode, antialias, via)
        table = values.to(torch.float32).contiguous()
        backends.launcher(backend).upsample_expectation_backward(
            features,
            axes,
            float32_rows(bias),
            table,
            softmax,
            grad.to(torch.float32).contiguous(),
            gradients,
            row_sums if values_gradient else None,
        )
    return [*gradients, row_sums]


def _gradients_fake(
    grad, features, bias, values, softmax, mode, antialias, via, values_gradient, backend
) -> list[Tensor]:
    rows = grad.shape[0] * grad.shape[1] if values_gradient else 0
    row_sums = grad.new_zeros((rows, features[0].shape[1]), dtype=torch.float32)
    return [*[empty_map(f, f.shape, True, torch.float32) for f in features], row_sums]


def _gradients_setup_context(ctx, inputs, output) -> None:
    grad, features, bias, values, *ctx.rest = inputs
    ctx.save_for_backward(grad, bias, values, *features)


def _gradients_backward(ctx, directions):
    """The gradient of the values comes as one sum for every output row, of rows of values of their own."""
    grad, bias, values, *features = ctx.saved_tensors
    softmax, mode, antialias, via, values_gradient, _ = ctx.rest
    *of_maps, of_rows = directions
    rows = values.expand(*grad.shape[:2], -1)

    def expectations(*tensors: Tensor) -> Tensor:
        *maps, table = tensors
        offset = None if bias is None else maps.pop()
        logits = reference.upsample_sum(maps, grad.shape[1:], offset, mode, antialias, via)
        return (reference.distribution(logits, NORMS[0] if softmax else NORMS[1]) * table.mT[..., None]).sum(1)

    wanted = [True] * len(features) + [False, values_gradient]
    (of_grad,), (*of_features, of_bias, of_values) = reference_second_derivative(
        expectations, [*features, bias, rows], [grad], [*of_maps, None, of_rows.view(*grad.shape[:2], -1)], wanted
    )
    return of_grad, of_features, of_bias, of_values.sum((0, 1)), *[None] * 6


register(
    "upsample_expectation(Tensor[] features, Tensor? bias, Tensor values, SymInt[] size, bool softmax, "
    "str interpolation, bool antialias, SymInt[]? via, str backend) -> Tensor",
    _forward,
    _fake,
    _backward,
    _setup_context,
)
register(
    "upsample_expectation_backward(Tensor grad, Tensor[] features, Tensor? bias, Tensor values, bool softmax, "
    "str interpolation, bool antialias, SymInt[]? via, bool values_gradient, str backend) -> Tensor[]",
    _gradients,
    _gradients_fake,
    _gradients_backward,
    _gradients_setup_context,
)
