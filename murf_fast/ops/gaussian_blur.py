"""Gaussian smoothing of score maps."""

from __future__ import annotations

from torch import Tensor

from murf_fast import backends, reference
from murf_fast._layout import is_channels_last
from murf_fast.annotations import Backend, Border
from murf_fast.ops import _checks, _contract
from murf_fast.ops._derivatives import linear
from murf_fast.ops._library import empty_map, layout_of, register

BORDERS = ("symmetric", "reflect")


def gaussian_blur(x: Tensor, sigma: float, *, border: Border = "symmetric", backend: Backend | None = None) -> Tensor:
    """Convolve maps with a Gaussian, cut off at four sigma, one axis after the other.

    ``out = G_h x G_w^T`` with ``2 int(4 sigma + 0.5) + 1`` normalized taps per axis: 33 for sigma 4. Equal to the dense
    33 x 33 convolution.

    Args:
        x: (B, C, H, W), floating point; any strides.
        sigma: in pixels, > 0.
        border: ``"symmetric"`` mirrors at the edge of the border pixel (d c b a | a b c d), as scipy's
            ``gaussian_filter`` and with it AnomalyDINO; ``"reflect"`` at its centre (d c b | a b c d), as anomalib.
        backend: ``"reference"``, ``"native"`` or ``"triton"``; None chooses by device.

    Returns:
        A map of the same shape and dtype.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        BackendUnavailableError: ``backend`` cannot take this call.

    Memory: the result. On CPU per thread a few rows, and a kept table of ``min(8 sigma + 1, n)`` weights for each of
    the n rows and columns, refused beyond 1 GiB. On GPU a float32 map. float64: three maps.

    Source: AnomalyDINO's ``dists2map``; anomalib's ``GaussianBlur2d``.
    """
    op = "gaussian_blur"
    _checks.map_(op, "x", x)
    sigma = _checks.number(op, "sigma", sigma)
    _check_sigma(op, sigma)
    _checks.choice(op, "border", border, BORDERS)
    _checks.no_gradients(op, "smoothing of scores", [x], forward_mode=True)
    backend, channels_last = _checks.backend(backend, x), is_channels_last(x)
    if backend == "reference":
        return _reference(x, sigma, border, channels_last, backend)
    return _gaussian_blur(x, sigma, border, channels_last, backend)


def _check_sigma(op: str, sigma: float) -> None:
    if not 0 < sigma < 1e6:
        raise ValueError(f"murf_fast.{op}: `sigma` must be a positive number of pixels below 1e6, got {sigma!r}")


def _requires(op, x, sigma, border, channels_last, backend) -> None:
    _contract.map_(op, "x", x, backend)
    _check_sigma(op, sigma)
    _contract.one_of(op, "border", border, BORDERS)


def _empty(x, sigma, border, channels_last, backend) -> Tensor:
    return empty_map(x, x.shape, channels_last)


def _launch(x, sigma, border, channels_last, backend, out) -> None:
    backends.launcher(backend).gaussian_blur(x, sigma, border, out)


def _reference(x, sigma, border, channels_last, backend) -> Tensor:
    return reference.gaussian_blur(x, sigma, border).contiguous(memory_format=layout_of(channels_last))


_gaussian_blur = register(
    "gaussian_blur(Tensor x, float sigma, str border, bool channels_last, str backend) -> Tensor",
    _requires,
    _empty,
    _launch,
    forward_mode=linear("gaussian_blur", 0),
    reference=_reference,
    checked=True,
)
