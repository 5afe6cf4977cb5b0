"""Gaussian smoothing of score maps."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast.ops import _checks
from murf_fast.ops._derivatives import linear
from murf_fast.ops._library import empty_map, is_channels_last, register
from murf_fast.tables.gaussian import gaussian_axis

OP = "gaussian_blur"
BORDERS = ("symmetric", "reflect")


def gaussian_blur(x: Tensor, sigma: float, *, border: str = "symmetric", backend: str | None = None) -> Tensor:
    """Convolve maps with a Gaussian, cut off at four sigma, one axis after the other in one pass.

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

    Memory: the result, and per thread a few rows; a kept table of ``min(8 sigma + 1, n)`` weights for each of the n
    rows and columns, refused beyond 1 GiB. float64: three maps.

    Source: AnomalyDINO's ``dists2map``; anomalib's ``GaussianBlur2d``.
    """
    _checks.map_(OP, "x", x)
    sigma = _checks.number(OP, "sigma", sigma)
    if not 0 < sigma < 1e6:
        raise ValueError(f"murf_fast.{OP}: `sigma` must be a positive number of pixels below 1e6, got {sigma!r}")
    _checks.choice(OP, "border", border, BORDERS)
    _checks.no_gradients(OP, "smoothing of scores", [x], forward_mode=True)
    backend = backends.resolve(backend, x.device.type, x.dtype)
    if backend == "reference":
        result = reference.gaussian_blur(x, sigma, border)
        return result.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)
    return torch.ops.murf_fast.gaussian_blur(x, sigma, border, is_channels_last(x), backend)


def _forward(x, sigma, border, channels_last, backend) -> Tensor:
    out = empty_map(x, x.shape, channels_last)
    if out.numel():
        axes = (gaussian_axis(x.shape[2], sigma, border), gaussian_axis(x.shape[3], sigma, border))
        backends.launcher(backend).upsample_sum([x], [axes], None, out)
    return out


register(
    "gaussian_blur(Tensor x, float sigma, str border, bool channels_last, str backend) -> Tensor",
    _forward,
    lambda x, sigma, border, channels_last, backend: empty_map(x, x.shape, channels_last),
    forward_mode=linear("gaussian_blur", 0),
)
