"""Feature maps of any number of channels brought to a fixed one: AnyUp's feature-agnostic layer."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from murf_fast import backends
from murf_fast._layout import is_channels_last
from murf_fast.annotations import Backend
from murf_fast.ops import _checks, _contract
from murf_fast.ops._derivatives import reference_second_derivative
from murf_fast.ops._library import as_float32, empty_map, layout_of, register
from murf_fast.reference.feature_unify import feature_unify as reference_op

VARIANTS = ("released", "paper")


def feature_unify(
    features: Tensor,
    basis: Tensor,
    variant: Literal["released", "paper"] = "released",
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Correlate every channel with a basis of filters, softmax and average: M channels, whatever came in.

    ``x[c, m] = (features[c] * basis[m])(p) / n(p)`` (zero padding, n taps inside the image). ``"paper"``:
    ``out[m] = mean_c softmax_m x[c, m]``. ``"released"``, which the released weights need: the C M responses in the
    order (channel, filter) are read as (M, C), ``out[i] = mean_j softmax_i x_flat[i C + j]``.

    Args:
        features: (B, C, h, w), floating point, any strides. AnyUp divides them by their norm over channels first.
        basis: (M, 1, k, k) or (M, k, k), k odd; floating point, used in float32.
        variant: ``"released"`` (AnyUp's code) or ``"paper"`` (its formula).
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None chooses from the tensors.

    Returns:
        (B, M, h, w) in the dtype and memory format of the features. Differentiable with respect to both;
        gradients are deterministic.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        BackendUnavailableError: ``backend`` cannot take this call.

    Memory: the result, and the C M responses of one pixel per thread; on GPU a copy of the features where their
    channels are not in the order needed. Backward: float32 sums as large as two feature maps; on GPU four numbers per
    channel and pixel, and 32 MiB. Second derivatives run through the reference, with all responses.

    Source: AnyUp (Wimmer et al.), ``layers/feature_unification.py``; section 3 of the paper for ``"paper"``.
    """
    op = "feature_unify"
    _checks.map_(op, "features", features)
    _checks.tensor(op, "basis", basis)
    _check_basis(op, basis)
    if basis.device != features.device:
        raise ValueError(f"murf_fast.{op}: `basis` must be on {features.device}, got {basis.device}")
    _checks.choice(op, "variant", variant, VARIANTS)
    backend = _checks.backend(backend, features)
    if backend == "reference":
        return _reference(features, basis, variant == "released", backend)
    return _feature_unify(features, basis, variant == "released", backend)


def _check_basis(op: str, basis: Tensor) -> None:
    k = basis.shape[-1] if basis.ndim else 0
    if basis.ndim == 0 or len(basis) < 1 or k % 2 == 0 or tuple(basis.shape[1:]) not in ((1, k, k), (k, k)):
        raise ValueError(f"murf_fast.{op}: `basis` must be (M, 1, k, k) with k odd, got shape {tuple(basis.shape)}")


def _requires(op, features, basis, released, backend) -> None:
    _contract.map_(op, "features", features, backend)
    _check_basis(op, basis)
    _contract.tensor(op, "basis", basis, features, basis.shape, _checks.DTYPES)


def _empty(features, basis, released, backend) -> Tensor:
    return empty_map(features, (features.shape[0], basis.shape[0], *features.shape[2:]), is_channels_last(features))


def _launch(features, basis, released, backend, out) -> None:
    backends.launcher(backend).feature_unify(features, as_float32(basis), released, out)


def _reference(features, basis, released, backend) -> Tensor:
    result = reference_op(features, basis, VARIANTS[0] if released else VARIANTS[1])
    return result.to(features.dtype).contiguous(memory_format=layout_of(is_channels_last(features)))


def _backward(wanted, arguments, grad):
    features, basis, released, backend = arguments
    wanted = list(wanted[:2])
    gradients = _gradient(grad, features, basis, released, wanted, backend)
    return [g if needed else None for g, needed in zip(gradients, wanted, strict=True)]


def _gradient_requires(op, grad, features, basis, released, wanted, backend) -> None:
    _requires(op, features, basis, released, backend)
    shape = (features.shape[0], len(basis), *features.shape[2:])
    _contract.tensor(op, "grad", grad, features, shape, (features.dtype,))
    _contract.count(op, "wanted", wanted, 2)


def _gradient_empty(grad, features, basis, released, wanted, backend) -> list[Tensor]:
    shape = features.shape if wanted[0] else (0, 1, 1, 1)
    of_features = empty_map(features, shape, is_channels_last(features))
    return [of_features, basis.new_empty(basis.shape if wanted[1] else (0,))]


def _gradient_launch(grad, features, basis, released, wanted, backend, results) -> None:
    # Runs of rows summed apart, with the rows around them: together at most two feature maps. By shapes alone.
    shares = max(1, min(16, features.shape[2] // (2 * basis.shape[-1])))
    backends.launcher(backend).feature_unify_backward(grad, features, as_float32(basis), released, shares, results)


def _gradient_backward(_, arguments, directions):
    grad, features, basis, released, wanted, _ = arguments
    variant = VARIANTS[0] if released else VARIANTS[1]
    of_grads, of_inputs = reference_second_derivative(
        lambda x, b: reference_op(x, b, variant), [features, basis], [grad], directions, wanted
    )
    return *of_grads, *of_inputs


_feature_unify = register(
    "feature_unify(Tensor features, Tensor basis, bool released, str backend) -> Tensor",
    _requires,
    _empty,
    _launch,
    _backward,
    reference=_reference,
    checked=True,
)
_gradient = register(
    "feature_unify_backward(Tensor grad, Tensor features, Tensor basis, bool released, bool[] wanted, str backend) "
    "-> Tensor[]",
    _gradient_requires,
    _gradient_empty,
    _gradient_launch,
    _gradient_backward,
)
