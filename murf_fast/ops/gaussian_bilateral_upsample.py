"""Joint bilateral upsampling with an anisotropic Gaussian of its own for every low-resolution cell."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast.annotations import Backend
from murf_fast.ops import _checks, _contract
from murf_fast.ops._derivatives import reference_second_derivative
from murf_fast.ops._library import empty_map, layout_of, register, wants_channels_last
from murf_fast.ops.resize import resize
from murf_fast.tables.disk import MAX_RADIUS

_MAPS = ("sigma_x", "sigma_y", "theta", "sigma_r")
_LEAST, _EPS = 1e-6, 1e-8  # of a sigma, and what is added to twice its square


def gaussian_bilateral_upsample(
    features: Tensor,
    guidance: Tensor,
    sigma_x: Tensor,
    sigma_y: Tensor,
    theta: Tensor,
    sigma_r: Tensor,
    *,
    radius: int = 8,
    reach: float | None = 2.0,
    low_guidance: Tensor | None = None,
    memory_format: torch.memory_format | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Average the features around every pixel, weighed by the Gaussians of their cells in position and in guidance.

    With ``d = p - center(q)`` in pixels of the result and every map taken at cell q::

        d_x = d[x] cos(theta) + d[y] sin(theta),    d_y = d[y] cos(theta) - d[x] sin(theta)
        log w(p, q) = -d_x^2 / (2 sigma_x^2) - d_y^2 / (2 sigma_y^2) - |guidance(p) - low_guidance(q)|^2 / (2 sigma_r^2)
        out(p) = sum_q w(p, q) features(q) / sum_q w(p, q)

    over the disk of cells ``q`` with a radius of ``r(p)`` cells around the one that p lies in; cells beyond the border
    are those of the border, which count as often. ``r(p)`` is ``reach * max(sigma_x, sigma_y)``, resized bilinearly to
    the result and rounded up, from 1 to ``radius``. Sigmas are 1e-6 at least, and 1e-8 is added to ``2 sigma^2``.

    Args:
        features: (B, C, h, w), floating point, any strides; any C.
        guidance: (B, G, H, W) at the result's size, in the dtype of the features or float32; H, W of any ratio to h, w.
        sigma_x, sigma_y: (B, 1, h, w), in pixels of the result; any floating dtype.
        theta: (B, 1, h, w), in radians.
        sigma_r: (B, 1, h, w), in units of the guidance.
        radius: Of the largest window, in cells; 1 to 32.
        reach: Cells of a window for each pixel of a sigma; None: windows of ``radius`` everywhere.
        low_guidance: (B, G, h, w), in the dtype of the features or float32; None: the guidance in float32, resized
            bilinearly without antialiasing.
        memory_format: Layout of the result; None means that of the features.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None chooses from the device.

    Returns:
        (B, C, H, W) in the dtype of the features; float32 arithmetic. Differentiable in every tensor; the size of a
        window, a whole number, has no gradient. Gradients are deterministic.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        BackendUnavailableError: ``backend`` cannot take this call.

    Memory: the result, one byte per pixel for the windows' sizes, float32 copies of low-resolution maps and of a
    guidance in half precision, and the weights of 64 pixels per thread. Backward: the gradients, and float32 sums of
    those of the cells, as large as the result at most.

    Source: Upsample Anything (arXiv 2511.16301), ``gs_jbu_aniso_noparent``, for one scale a whole number.
    """
    op = "gaussian_bilateral_upsample"
    _checks.map_(op, "features", features)
    _checks.map_(op, "guidance", guidance)
    _checks.companion(op, "guidance", guidance, "features", features)
    (batch, _, h, w), (_, guides, height, width) = features.shape, guidance.shape
    maps = (sigma_x, sigma_y, theta, sigma_r)
    for name, x in zip(_MAPS, maps, strict=True):
        _checks.tensor(op, name, x)
        _checks.same_device(op, name, x, "features", features)
        _check_shape(op, name, x, (batch, 1, h, w))
    radius = _checks.integer(op, "radius", radius)
    _check_radius(op, radius)
    if reach is not None:
        reach = _checks.number(op, "reach", reach)
        if not reach > 0:
            raise ValueError(f"murf_fast.{op}: `reach` must be positive, got {reach!r}")
    if low_guidance is not None:
        _checks.map_(op, "low_guidance", low_guidance)
        _checks.companion(op, "low_guidance", low_guidance, "features", features)
        _check_shape(op, "low_guidance", low_guidance, (batch, guides, h, w))
    channels_last = wants_channels_last(op, memory_format, features)
    chosen = _checks.backend(backend, features)
    # As kernels take it; and both gradients that it may get are rounded together.
    guidance = guidance.to(torch.promote_types(guidance.dtype, torch.float32))
    if low_guidance is None:
        low_guidance = resize(guidance, (h, w), backend=backend)
    radii = None
    if reach is not None:
        radii = reference.gaussian_bilateral_radii(sigma_x, sigma_y, (height, width), radius, reach)
    tensors = (features, guidance, low_guidance, *maps)
    if chosen == "reference":
        return _reference(*tensors, radii, radius, channels_last, chosen)
    return _gaussian_bilateral_upsample(*tensors, radii, radius, channels_last, chosen)


def _check_shape(op: str, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"murf_fast.{op}: `{name}` must have shape {shape}, got {tuple(x.shape)}")


def _check_radius(op: str, radius: int) -> None:
    if not 1 <= radius <= MAX_RADIUS:
        raise ValueError(f"murf_fast.{op}: `radius` must be 1 to {MAX_RADIUS} cells, got {radius}")


def _requires(
    op, features, guidance, low_guidance, sigma_x, sigma_y, theta, sigma_r, radii, radius, channels_last, backend
) -> None:
    _contract.map_(op, "features", features, backend)
    _contract.map_(op, "guidance", guidance)
    (batch, _, h, w), (_, guides, height, width) = features.shape, guidance.shape
    dtypes = (features.dtype, torch.float32)
    _contract.tensor(op, "guidance", guidance, features, (batch, None, None, None), dtypes)
    _contract.tensor(op, "low_guidance", low_guidance, features, (batch, guides, h, w), dtypes)
    for name, x in zip(_MAPS, (sigma_x, sigma_y, theta, sigma_r), strict=True):
        _contract.tensor(op, name, x, features, (batch, 1, h, w), _checks.DTYPES)
    if radii is not None:
        _contract.tensor(op, "radii", radii, features, (batch, 1, height, width), (torch.uint8,))
    _check_radius(op, radius)


def _empty(features, guidance, *rest) -> Tensor:
    return empty_map(features, (*features.shape[:2], *guidance.shape[2:]), rest[-2])


def _launch(
    features, guidance, low_guidance, sigma_x, sigma_y, theta, sigma_r, radii, radius, channels_last, backend, out
) -> None:
    cells = _cells(low_guidance, sigma_x, sigma_y, theta, sigma_r)
    backends.launcher(backend).gaussian_bilateral_upsample(
        features, guidance.float(), cells, _dense(radii), radius, out
    )


def _reference(features, *rest) -> Tensor:
    *tensors, radii, radius, channels_last, _ = rest
    result = reference.gaussian_bilateral_upsample(features, *tensors, radius, radii).to(features.dtype)
    return result.contiguous(memory_format=layout_of(channels_last))


def _cells(low_guidance: Tensor, *maps: Tensor) -> Tensor:
    """What a kernel needs of a cell, float32 (B, h, w, 5 + G).

    The rows of the matrix that takes a distance to the two numbers whose squares are subtracted from the logarithm of a
    weight; the factor of the squared difference in guidance; the guidance. Each is rounded once: all pixels around a
    cell have its errors.
    """
    sigma_x, sigma_y, theta, sigma_r = (x[:, 0].double() for x in maps)
    (along, across, tone), cos, sin = map(_factor, (sigma_x, sigma_y, sigma_r)), theta.cos(), theta.sin()
    along, across = along.sqrt(), across.sqrt()
    rows = (along * cos, along * sin, -across * sin, across * cos, tone, *low_guidance.double().unbind(1))
    return torch.stack(rows, -1).float()


def _factor(sigma: Tensor) -> Tensor:
    return 1 / (2 * sigma.clamp_min(_LEAST) ** 2 + _EPS)


def _dense(radii: Tensor | None) -> Tensor | None:
    return None if radii is None else radii.contiguous()


def _backward(wanted, arguments, grad):
    *tensors, radii, radius, _, backend = arguments
    wanted = list(wanted[:7])
    gradients = _gradient(grad, *tensors, radii, radius, wanted, backend)
    return [g if needed else None for g, needed in zip(gradients, wanted, strict=True)]


def _gradient_requires(op, grad, *rest) -> None:
    *arguments, wanted, backend = rest
    _requires(op, *arguments, False, backend)  # type: ignore[call-arg]  # their number is not known
    features, guidance = arguments[:2]
    shape = (*features.shape[:2], *guidance.shape[2:])
    _contract.tensor(op, "grad", grad, features, shape, (features.dtype,))
    _contract.count(op, "wanted", wanted, 7)


def _gradient_empty(grad, *rest) -> list[Tensor]:
    """An unwanted gradient is empty."""
    *tensors, _, _, wanted, _ = rest
    return [torch.empty_like(x) if n else x.new_empty((0,)) for x, n in zip(tensors, wanted, strict=True)]


def _gradient_launch(
    grad, features, guidance, low_guidance, sigma_x, sigma_y, theta, sigma_r, radii, radius, wanted, backend, results
) -> None:
    cells = _cells(low_guidance, sigma_x, sigma_y, theta, sigma_r)
    of_features, of_guidance, sums = backends.launcher(backend).gaussian_bilateral_upsample_backward(
        grad, features, guidance.float(), cells, _dense(radii), radius, (wanted[0], wanted[1], any(wanted[2:]))
    )
    made = [of_features, of_guidance, *([None] * 5 if sums is None else _of_maps(sums, sigma_x, sigma_y, sigma_r))]
    for result, gradient, needed in zip(results, made, wanted, strict=True):
        if needed:
            result.copy_(gradient)


def _of_maps(sums: Tensor, *sigmas: Tensor) -> list[Tensor]:
    """Gradients of the cells' maps, from sums (B, h, w, 4 + G) over the pixels of the gradient of a weight's logarithm.

    It is multiplied with the squares and the product of the two numbers of a distance (:func:`_cells`), the squared
    difference in guidance, and the difference.
    """
    xx, yy, xy, tones = sums[..., :4].unbind(-1)
    sigma_x, sigma_y, sigma_r = (x[:, 0].double() for x in sigmas)
    along, across, tone = map(_factor, (sigma_x, sigma_y, sigma_r))
    of_x = 4 * sigma_x * along * xx * (sigma_x >= _LEAST)
    of_y = 4 * sigma_y * across * yy * (sigma_y >= _LEAST)
    of_theta = 2 * (across - along) / (across * along).sqrt() * xy
    of_r = 4 * sigma_r * tone**2 * tones * (sigma_r >= _LEAST)
    of_guidance = 2 * tone[..., None] * sums[..., 4:]
    return [of_guidance.permute(0, 3, 1, 2), *(g[:, None] for g in (of_x, of_y, of_theta, of_r))]


def _gradient_backward(_, arguments, directions):
    grad, *inputs, radii, radius, wanted, _ = arguments

    def upsampled(*tensors: Tensor) -> Tensor:
        return reference.gaussian_bilateral_upsample(*tensors, radius, radii)

    of_grads, of_inputs = reference_second_derivative(upsampled, inputs, [grad], directions, wanted)
    return *of_grads, *of_inputs


_gaussian_bilateral_upsample = register(
    "gaussian_bilateral_upsample(Tensor features, Tensor guidance, Tensor low_guidance, Tensor sigma_x, "
    "Tensor sigma_y, Tensor theta, Tensor sigma_r, Tensor? radii, int max_radius, bool channels_last, str backend) "
    "-> Tensor",
    _requires,
    _empty,
    _launch,
    _backward,
    reference=_reference,
    checked=True,
)
_gradient = register(
    "gaussian_bilateral_upsample_backward(Tensor grad, Tensor features, Tensor guidance, Tensor low_guidance, "
    "Tensor sigma_x, Tensor sigma_y, Tensor theta, Tensor sigma_r, Tensor? radii, int max_radius, bool[] wanted, "
    "str backend) -> Tensor[]",
    _gradient_requires,
    _gradient_empty,
    _gradient_launch,
    _gradient_backward,
)
