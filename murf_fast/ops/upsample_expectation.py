"""Expected value per pixel of a distribution over channels: the depth head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast.annotations import Backend, Mode, Norm, Size
from murf_fast.ops import _checks, _contract
from murf_fast.ops._derivatives import reference_second_derivative
from murf_fast.ops._library import as_float32, axes_of_maps, bias_gradient, empty_map, float32_rows, register

NORMS = ("softmax", "linear")


def upsample_expectation(
    features: Sequence[Tensor],
    size: Size,
    values: Tensor,
    *,
    bias: Tensor | None = None,
    norm: Norm = "softmax",
    mode: Mode = "bilinear",
    antialias: bool = False,
    via: Size | None = None,
    backend: Backend | None = None,
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
    and, when ``values`` wants a gradient, K numbers per output row. On a GPU also copies of maps whose channels are no
    multiple of 16 or not side by side, where the result is four times as large.

    Source: MuRF's depth head (``norm_strategy`` nonlinear and linear), DINOv2's ``BNHead`` (linear).
    """
    op = "upsample_expectation"
    features = _checks.maps(op, features, same_channels=True)
    how = _checks.resize(op, size, mode, antialias, via)
    _checks.bias(op, bias, features)
    _checks.vector(op, "values", values, features[0].shape[1], features[0], what="one value per channel")
    _checks.choice(op, "norm", norm, NORMS)
    dtype = torch.promote_types(features[0].dtype, values.dtype)
    backend = _checks.backend(backend, features[0], dtype)
    if backend == "reference":
        return _reference(features, bias, values, norm == "softmax", how, backend).to(dtype)
    return _upsample_expectation(features, bias, values, norm == "softmax", how, backend).to(dtype)


def _requires(op, features, bias, values, softmax, how, backend) -> None:
    _contract.sum_of_maps(op, features, bias, how, backend)
    _contract.tensor(op, "values", values, features[0], (features[0].shape[1],), _checks.DTYPES)


def _empty(features, bias, values, softmax, how, backend) -> Tensor:
    return features[0].new_empty((features[0].shape[0], *how.size), dtype=torch.float32)


def _launch(features, bias, values, softmax, how, backend, out) -> None:
    backends.launcher(backend).upsample_expectation(
        features, axes_of_maps(features, *how), float32_rows(bias), as_float32(values), softmax, out
    )


def _reference(features, bias, values, softmax, how, backend) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(features[0].dtype, values.dtype), torch.float32)
    norm = NORMS[0] if softmax else NORMS[1]
    return reference.upsample_expectation([f.to(dtype) for f in features], how.size, values, bias, norm, **how.options)


def _backward(wanted, arguments, grad):
    features, bias, values, softmax, how, backend = arguments
    of_maps, of_bias, of_values = wanted[:3]
    *gradients, row_sums = _gradient(grad, features, bias, values, softmax, how, of_values, backend)
    return (
        [g.to(f.dtype) if needed else None for g, f, needed in zip(gradients, features, of_maps, strict=True)],
        # The rows of a resize sum to one, so the gradient of any one map has the same sum.
        bias_gradient(gradients[0], bias) if of_bias else None,
        row_sums.sum(0).to(values.dtype) if of_values else None,
    )


def _gradient_requires(op, grad, features, bias, values, softmax, how, values_gradient, backend) -> None:
    _requires(op, features, bias, values, softmax, how._replace(size=grad.shape[1:]), backend)
    _contract.tensor(op, "grad", grad, features[0], (features[0].shape[0], None, None), _checks.DTYPES)


def _gradient_empty(grad, features, bias, values, softmax, how, values_gradient, backend) -> list[Tensor]:
    rows = grad.shape[0] * grad.shape[1] if values_gradient else 0
    row_sums = grad.new_zeros((rows, features[0].shape[1]), dtype=torch.float32)
    return [*[empty_map(f, f.shape, True, torch.float32) for f in features], row_sums]


def _gradient_launch(grad, features, bias, values, softmax, how, values_gradient, backend, results) -> None:
    *gradients, row_sums = results
    backends.launcher(backend).upsample_expectation_backward(
        features,
        axes_of_maps(features, *how._replace(size=tuple(grad.shape[1:]))),
        float32_rows(bias),
        as_float32(values),
        softmax,
        as_float32(grad),
        gradients,
        row_sums if values_gradient else None,
    )


def _gradient_backward(_, arguments, directions):
    """The gradient of the values comes as one sum for every output row, of rows of values of their own."""
    grad, features, bias, values, softmax, how, values_gradient, _ = arguments
    *of_maps, of_rows = directions
    rows = values.expand(*grad.shape[:2], -1)

    def expectations(*tensors: Tensor) -> Tensor:
        *maps, table = tensors
        offset = None if bias is None else maps.pop()
        logits = reference.upsample_sum(maps, grad.shape[1:], offset, **how.options)
        return (reference.distribution(logits, NORMS[0] if softmax else NORMS[1]) * table.mT[..., None]).sum(1)

    wanted = [True] * len(features) + [False, values_gradient]
    (of_grad,), (*of_features, of_bias, of_values) = reference_second_derivative(
        expectations, [*features, bias, rows], [grad], [*of_maps, None, of_rows.view(*grad.shape[:2], -1)], wanted
    )
    return of_grad, of_features, of_bias, None if of_values is None else of_values.sum((0, 1))


_upsample_expectation = register(
    "upsample_expectation(Tensor[] features, Tensor? bias, Tensor values, SymInt[] size, bool softmax, "
    "str interpolation, bool antialias, SymInt[]? via, str backend) -> Tensor",
    _requires,
    _empty,
    _launch,
    _backward,
    reference=_reference,
    onnx=True,
    checked=True,
)
_gradient = register(
    "upsample_expectation_backward(Tensor grad, Tensor[] features, Tensor? bias, Tensor values, bool softmax, "
    "str interpolation, bool antialias, SymInt[]? via, bool values_gradient, str backend) -> Tensor[]",
    _gradient_requires,
    _gradient_empty,
    _gradient_launch,
    _gradient_backward,
)
