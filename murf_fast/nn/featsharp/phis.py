"""PHI-S: features of unit variance by a rotation and one number, both of which can be undone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast.nn._parts import peculiarity
from murf_fast.nn.featsharp._hadamard import hadamard, is_constructible, neighbors
from murf_fast.ops import _checks

# Rows that are converted to float64 at a time.
_ROWS = 4096

Linear = TypeVar("Linear", nn.Linear, nn.Conv2d)


class PHIS(nn.Module):
    """Standardizes features without distortion: ``x' = alpha R (x - mean)``.

    With the covariance ``V diag(L) V^T`` of the features, ``alpha = 1 / sqrt(mean L)`` and ``R = H V^T`` for a
    normalized Hadamard matrix H. All entries of H have one size, so that every channel of ``x'`` has variance one,
    while distances and angles about the mean are those of x, but for the factor alpha.

    Args:
        channels: C: 1, 2, or a multiple of 4 for which the constructions of Sylvester, Paley and Kronecker have a
            Hadamard matrix, as the widths of vision transformers are (384, 768, 1024, 1152, 1280, 1408, 1536, and any
            a 2^k with a = 1, 12, 20, 28, 36, 44, 52, ...). A new module does nothing: mean 0, alpha 1, R = I.

    Raises:
        TypeError, ValueError: ``channels`` is no such number; the message names the nearest that are.

    Attributes:
        mean: (C,). alpha: (). rotation, inv_rotation: (C, C), R and its inverse, ``V H^T``. Buffers.

    Source: PHI-S (Ranzinger et al., 2024), as FeatSharp normalizes features (section 3.2).
    """

    mean: Tensor
    alpha: Tensor
    rotation: Tensor
    inv_rotation: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels = _checked_channels(channels)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("alpha", torch.tensor(1.0))
        self.register_buffer("rotation", torch.eye(channels))
        self.register_buffer("inv_rotation", torch.eye(channels))

    @classmethod
    def fit(cls, features: Iterable[Tensor]) -> PHIS:
        """From a stream of features; one pass, in float64.

        Args:
            features: Tensors of one number of channels, on one device: maps (B, C, H, W), or rows (..., C) of two or
                three dimensions. Every pixel counts alike. The paper takes 100 000 samples.

        Returns:
            A float32 module on the device of the features. The covariance is that of the stream (divided by the
            number of rows); it may be singular, as nothing is divided by its eigenvalues, but not zero.

        Raises:
            TypeError: ``features`` is no iterable of floating-point tensors.
            ValueError: The stream is empty or constant, holds values that are not finite, or changes its channels.

        Memory: three (C, C) matrices and 4096 rows in float64.
        """
        moments = _Moments()
        if isinstance(features, Tensor):
            features = [features]
        if not isinstance(features, Iterable):
            raise TypeError(
                f"murf_fast.PHIS.fit: `features` must be an iterable of tensors, got {type(features).__name__}"
            )
        for i, x in enumerate(features):
            moments.add(i, x)
        if not moments.count:
            raise ValueError("murf_fast.PHIS.fit: `features` must hold at least two rows, got an empty stream")
        if not bool(moments.mean.isfinite().all() & moments.squares.isfinite().all()):
            raise ValueError("murf_fast.PHIS.fit: `features` must be finite, as must their squares, and are not")
        return cls._of("PHIS.fit", "`features`", moments.mean, moments.squares / moments.count)

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor) -> PHIS:
        """From a mean (C,) and a covariance (C, C), which are taken in float64.

        Raises:
            TypeError, ValueError: They are no floating-point tensors of these shapes, not finite, or the covariance is
                zero or not symmetric.
        """
        what = "PHIS.from_moments"
        _checks.tensor(what, "mean", mean)
        _checks.tensor(what, "covariance", covariance)
        if mean.ndim != 1 or tuple(covariance.shape) != (len(mean), len(mean)):
            raise ValueError(
                f"murf_fast.{what}: `mean` must be (C,) and `covariance` (C, C), got {tuple(mean.shape)} and "
                f"{tuple(covariance.shape)}"
            )
        _checks.same_device(what, "covariance", covariance, "mean", mean)
        mean, covariance = mean.detach().double(), covariance.detach().double()
        if not (bool(mean.isfinite().all()) and bool(covariance.isfinite().all())):
            raise ValueError(f"murf_fast.{what}: `mean` and `covariance` must be finite")
        if not torch.allclose(covariance, covariance.mT):
            apart = float((covariance - covariance.mT).abs().max())
            raise ValueError(f"murf_fast.{what}: `covariance` must be symmetric, got entries that are {apart:g} apart")
        return cls._of(what, "`covariance`", mean, covariance)

    @classmethod
    def _of(cls, what: str, name: str, mean: Tensor, covariance: Tensor) -> PHIS:
        model = cls(len(mean))
        values, vectors = torch.linalg.eigh(covariance)
        variance = values.clamp(min=0).mean()
        # Less than the roundings of a mean of equal numbers is no variance.
        if not bool(variance > (4 * torch.finfo(mean.dtype).eps * mean.abs().max()).square()):
            raise ValueError(
                f"murf_fast.{what}: {name} must be of features that vary, got a mean variance of {float(variance)}"
            )
        if not bool(variance.rsqrt().float().isfinite()):
            raise ValueError(
                f"murf_fast.{what}: {name} must be of features whose deviation has a reciprocal in float32, got a mean "
                f"variance of {float(variance)}"
            )
        rotation = torch.from_numpy(hadamard(len(mean))).to(mean) * len(mean) ** -0.5 @ vectors.mT
        found = {"mean": mean, "alpha": variance.rsqrt(), "rotation": rotation, "inv_rotation": rotation.mT}
        model.load_state_dict({name: t.float().contiguous() for name, t in found.items()}, assign=True)
        return model

    def forward(self, features: Tensor) -> Tensor:
        """Standardized features.

        Args:
            features: Maps (B, C, H, W), or rows (..., C) of two or three dimensions; floating point.

        Returns:
            The same shape and dtype; a map has its channels last by strides. Computed in the wider of the dtypes of
            features and module, also under autocast. Differentiable.

        Raises:
            TypeError, ValueError: ``features`` is no such tensor, or on another device.

        Memory: the result and the centred features; where the dtypes differ, both also in the wider one.
        """
        wide = torch.promote_types(features.dtype, self.mean.dtype) if isinstance(features, Tensor) else None
        rows, as_given = self._rows("PHIS.forward", features)
        with torch.autocast(features.device.type, enabled=False):
            result = F.linear(rows.to(wide) - self.mean.to(wide), self.alpha.to(wide) * self.rotation.to(wide))
        return as_given(result.to(features.dtype))

    if TYPE_CHECKING:
        __call__ = forward

    def inverse(self, features: Tensor) -> Tensor:
        """Features from standardized ones: ``x = R^-1 x' / alpha + mean``. All else is as for :meth:`forward`."""
        wide = torch.promote_types(features.dtype, self.mean.dtype) if isinstance(features, Tensor) else None
        rows, as_given = self._rows("PHIS.inverse", features)
        with torch.autocast(features.device.type, enabled=False):
            result = F.linear(rows.to(wide), self.inv_rotation.to(wide) / self.alpha.to(wide), self.mean.to(wide))
        return as_given(result.to(features.dtype))

    def fold(self, linear: Linear) -> Linear:
        """A linear map of raw features that equals ``linear`` of standardized ones.

        ``W' = alpha W R``, ``b' = b - W' mean``, in float64 and rounded once.

        Args:
            linear: An ``nn.Linear``, or a 1x1 ``nn.Conv2d``, of C inputs.

        Returns:
            A new module of the same kind, dtype and device, with a bias.

        Raises:
            TypeError: It is another module.
            ValueError: It has another number of inputs, hooks or a ``forward`` of its own, or is no 1x1 convolution.
        """
        what = "PHIS.fold"
        kind: Any = next((k for k in (nn.Linear, nn.Conv2d) if isinstance(linear, k)), None)
        if kind is None:
            got = type(linear).__name__
            raise TypeError(f"murf_fast.{what}: `linear` must be an nn.Linear or a 1x1 nn.Conv2d, got {got}")
        reason = peculiarity(linear)
        if reason is not None:
            raise ValueError(f"murf_fast.{what}: `linear` {reason}, which would be lost: only its weights are read")
        weight, channels = linear.weight, len(self.mean)
        convolution: Any = linear
        options: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        plain = kind is nn.Linear or (convolution.kernel_size, convolution.stride, convolution.groups) == (
            (1, 1),
            (1, 1),
            1,
        )
        if not plain or (kind is nn.Conv2d and convolution.padding not in ("valid", "same", 0, (0, 0))):
            raise ValueError(f"murf_fast.{what}: `linear` must be a 1x1 convolution, got {linear}")
        if weight.shape[1] != channels:
            raise ValueError(f"murf_fast.{what}: `linear` must have {channels} inputs, got {weight.shape[1]}")
        _checks.same_device(what, "linear", weight, "mean", self.mean)
        arguments = (channels, len(weight)) if kind is nn.Linear else (channels, len(weight), 1)
        folded = kind(*arguments, **options)
        with torch.no_grad():
            matrix = self.alpha.double() * (weight.flatten(1).double() @ self.rotation.double())
            bias = -(matrix @ self.mean.double())
            bias = bias if linear.bias is None else bias + linear.bias
            folded.weight.copy_(matrix.view(weight.shape))
            folded.bias.copy_(bias)
        return folded.train(linear.training)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"

    def _rows(self, what: str, features: Tensor) -> Any:
        """Features with channels last, and what brings a result to their shape."""
        _checks.tensor(what, "features", features)
        _checks.same_device(what, "features", features, "mean", self.mean)
        channels_first = features.ndim == 4
        rows = features.permute(0, 2, 3, 1) if channels_first else features
        if features.ndim not in (2, 3, 4) or rows.shape[-1] != len(self.mean):
            raise ValueError(
                f"murf_fast.{what}: `features` must be (B, {len(self.mean)}, H, W) or (..., {len(self.mean)}) of two "
                f"or three dimensions, got {tuple(features.shape)}"
            )
        return rows, (lambda y: y.permute(0, 3, 1, 2)) if channels_first else (lambda y: y)


def _checked_channels(channels: object) -> int:
    channels = _checks.integer("PHIS", "channels", channels, 1)
    if not is_constructible(channels):
        raise ValueError(
            f"murf_fast.PHIS: `channels` must be the order of a Hadamard matrix, 1, 2, or a multiple of 4 that "
            f"Sylvester's, Paley's and Kronecker's constructions give; the nearest are {neighbors(channels)}, got "
            f"{channels}"
        )
    return channels


class _Moments:
    """Mean, and sum of products about it, of rows that come one batch after the other."""

    mean: Tensor  # from the first batch on, like the sum
    squares: Tensor

    def __init__(self) -> None:
        self.count = 0

    def add(self, i: int, x: Tensor) -> None:
        what, name = "PHIS.fit", f"features[{i}]"
        _checks.tensor(what, name, x)
        if x.ndim not in (2, 3, 4):
            raise ValueError(
                f"murf_fast.{what}: `{name}` must be (B, C, H, W) or (..., C) of two or three dimensions, got "
                f"{tuple(x.shape)}"
            )
        rows = x.detach().permute(0, 2, 3, 1) if x.ndim == 4 else x.detach()
        channels = rows.shape[-1]
        if not hasattr(self, "mean"):
            _checked_channels(channels)  # before any work
            self.mean = torch.zeros(channels, dtype=torch.float64, device=x.device)
            self.squares = torch.zeros((channels, channels), dtype=torch.float64, device=x.device)
        if channels != len(self.mean) or x.device != self.mean.device:
            raise ValueError(
                f"murf_fast.{what}: `{name}` must have {len(self.mean)} channels on {self.mean.device}, as those "
                f"before, got {channels} on {x.device}"
            )
        for part in rows.reshape(-1, channels).split(_ROWS):
            if len(part):
                self._merge(part.double())

    def _merge(self, rows: Tensor) -> None:
        """Chan's update, in which no large sums cancel."""
        count = self.count + len(rows)
        mean = rows.mean(0)
        centred, step = rows - mean, mean - self.mean
        self.squares.addmm_(centred.mT, centred)
        self.squares.addr_(step, step, alpha=self.count * len(rows) / count)
        self.mean.add_(step, alpha=len(rows) / count)
        self.count = count
