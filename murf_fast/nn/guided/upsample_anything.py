"""Upsample Anything: kernels that are fitted to one image, for features of any kind."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast._capture import captured, may_capture
from murf_fast.annotations import Size
from murf_fast.ops import _checks
from murf_fast.ops.gaussian_bilateral_upsample import gaussian_bilateral_upsample
from murf_fast.ops.resize import resize
from murf_fast.tables.disk import MAX_RADIUS

_WHAT = "UpsampleAnything"
_BETAS, _EPS = (0.9, 0.999), 1e-8  # torch's Adam
_EAGER_STEPS = 3  # on a GPU, which compile what a graph is then made of: the host takes longer than the device
_LAST_RATE, _LAST_STEP = 1e-9, 5100  # of the original's schedule, which it leaves after 51 steps


class CellKernels(NamedTuple):
    """What :func:`murf_fast.gaussian_bilateral_upsample` takes, each (B, 1, h, w)."""

    sigma_x: Tensor
    sigma_y: Tensor
    theta: Tensor
    sigma_r: Tensor


class UpsampleAnything(nn.Module):
    """Any low-resolution map at the resolution of its image, by kernels fitted to that image: no weights, no training.

    The image, shrunk to the map's grid (bicubic), is upsampled with the image itself as guidance; ``steps`` steps of
    Adam on every cell's ``log sigma_x, log sigma_y, atanh(theta / pi), log sigma_r`` lessen the mean absolute
    difference from the image, at a rate of ``rate * (1e-9 / rate) ** (step / 5100)``. The kernels found then upsample
    the map.

    Args:
        steps: Of the optimization; 0 leaves the kernels as they begin.
        rate: Adam's learning rate at the first step.
        sigma: Of both axes at the beginning, in pixels.
        sigma_r: At the beginning, in units of the image.
        radius, reach: Of the windows, see :func:`murf_fast.gaussian_bilateral_upsample`.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Source: Upsample Anything (arXiv 2511.16301), github.com/seominseok0429/Upsample-Anything_Pytorch, ``UPA``. Not as
    there: a batch, each image by itself; sizes that are no whole multiples of the map's; float32 in place of autocast.
    """

    def __init__(
        self,
        *,
        steps: int = 51,
        rate: float = 0.1,
        sigma: float = 16.0,
        sigma_r: float = 0.12,
        radius: int = 8,
        reach: float | None = 2.0,
    ) -> None:
        super().__init__()
        self.steps = _checks.integer(_WHAT, "steps", steps, 0)
        self.rate, self.sigma, self.sigma_r = (
            _positive(name, value) for name, value in (("rate", rate), ("sigma", sigma), ("sigma_r", sigma_r))
        )
        self.radius = _checks.integer(_WHAT, "radius", radius)
        if not 1 <= self.radius <= MAX_RADIUS:
            raise ValueError(f"murf_fast.{_WHAT}: `radius` must be 1 to {MAX_RADIUS} cells, got {radius!r}")
        self.reach = None if reach is None else _positive("reach", reach)

    def forward(self, image: Tensor, features: Tensor, kernels: CellKernels | None = None) -> Tensor:
        """Upsamples ``features`` to the size of ``image``.

        Args:
            image: (B, 3, H, W) in 0..1, floating point; any number of channels, any image that is aligned with the
                features (depth, say).
            features: (B, C, h, w), floating point, any strides.
            kernels: Those of :meth:`fit` for this image and grid, to be used for several maps; None: they are fitted.

        Returns:
            (B, C, H, W) in dtype and layout of the features; differentiable with respect to the features, and to image
            and kernels where the latter are given.

        Raises:
            TypeError, ValueError: An argument is wrong; the message names it.

        Memory: that of the op on the image's channels, forward and backward, then that of the op on the features.
        """
        _check(image, features)
        if kernels is None:
            kernels, image = self.fit(image, tuple(features.shape[2:])), image.detach()
        elif not isinstance(kernels, tuple) or len(kernels) != len(CellKernels._fields):
            raise TypeError(f"murf_fast.{_WHAT}: `kernels` must be what `fit` returns, got {type(kernels).__name__}")
        precise = torch.float64 if features.dtype == torch.float64 else torch.float32
        return gaussian_bilateral_upsample(features, image.to(precise), *kernels, radius=self.radius, reach=self.reach)

    if TYPE_CHECKING:
        __call__ = forward

    def fit(self, image: Tensor, grid: Size) -> CellKernels:
        """Kernels for maps of ``grid`` = (h, w) cells; they carry no gradient.

        float32, or float64 for an image of that; the same numbers with any number of threads.
        """
        _checks.map_(_WHAT, "image", image)
        grid = _checks.grid(_WHAT, "grid", grid)
        precise = torch.promote_types(image.dtype, torch.float32)
        # Whatever the caller's mode is, gradients are needed here.
        with torch.inference_mode(False), torch.enable_grad():
            image = image.detach().to(precise, copy=image.is_inference())
            low, guidance = resize(image, grid, mode="bicubic"), resize(image, grid)
            begin = [math.log(self.sigma), math.log(self.sigma), 0.0, math.log(self.sigma_r)]
            raw = torch.tensor(begin, dtype=precise, device=image.device).view(4, 1, 1, 1, 1)
            raw = raw.repeat(1, len(image), 1, *grid).requires_grad_()
            on_gpu = may_capture(image.device)
            # Numbers of the host would be fixed in a graph.
            rate: Any = torch.tensor(self.rate, dtype=torch.float32, device=image.device) if on_gpu else self.rate
            adam = torch.optim.Adam([raw], lr=rate, betas=_BETAS, eps=_EPS, capturable=on_gpu)
            options: dict[str, Any] = {"radius": self.radius, "reach": self.reach, "low_guidance": guidance}

            def advance() -> None:
                made = gaussian_bilateral_upsample(low, image, *_kernels(raw), **options)
                # A mean for each image: its kernels do not depend on the others.
                (raw.grad,) = torch.autograd.grad(F.l1_loss(made, image, reduction="sum") / image[0].numel(), [raw])
                adam.step()

            graph = None
            for step in range(self.steps if image.numel() else 0):
                now = self.rate * (_LAST_RATE / self.rate) ** (step / _LAST_STEP)
                if on_gpu:
                    rate.fill_(now)
                else:
                    adam.param_groups[0]["lr"] = now
                if on_gpu and step == _EAGER_STEPS and self.steps >= 2 * _EAGER_STEPS:
                    graph = captured(advance, image.device)
                if graph is None:
                    advance()
                else:
                    graph.replay()
            if graph is not None:  # it must not go away while it runs
                torch.cuda.current_stream(image.device).synchronize()
            return CellKernels(*(x.detach() for x in _kernels(raw)))

    def extra_repr(self) -> str:
        return f"steps={self.steps}, rate={self.rate}, radius={self.radius}, reach={self.reach}"


def _kernels(raw: Tensor) -> CellKernels:
    along, across, angle, tone = raw
    return CellKernels(along.exp(), across.exp(), math.pi * angle.tanh(), tone.exp())


def _positive(name: str, value: object) -> float:
    value = _checks.number(_WHAT, name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"murf_fast.{_WHAT}: `{name}` must be positive and finite, got {value!r}")
    return value


def _check(image: Any, features: Any) -> None:
    _checks.map_(_WHAT, "image", image)
    _checks.map_(_WHAT, "features", features)
    _checks.same_device(_WHAT, "features", features, "image", image)
    if image.shape[0] != features.shape[0]:
        raise ValueError(
            f"murf_fast.{_WHAT}: `features` must have the batch size of `image`, {image.shape[0]}, "
            f"got {features.shape[0]}"
        )
