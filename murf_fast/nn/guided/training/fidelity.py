"""How faithful upsampled features are to the backbone: the variance of what it makes by the error of the prediction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from murf_fast.ops import _checks


class Fidelity:
    """``MSE(Y, mean Y) / MSE(X, Y)``, of any number of batches; 1 is a constant prediction's, more is better.

    The mean is that of every channel over all places of all batches. What changes scale, place or basis of features
    without distortion (PHI-S) does not change it. Sums are in float64, on the device of the first batch; nothing waits
    for it.

    Source: FeatSharp, equation 7; PHI-S, equation 51.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean: Tensor | Any = None  # until the first batch
        self._spread: Tensor | Any = None
        self._error: Tensor | Any = None

    @torch.no_grad()
    def update(self, predictions: Tensor, targets: Tensor) -> Fidelity:
        """Counts a batch in.

        Args:
            predictions: X, (B, C, h, w), floating point: upsampled features, seen in the views and downsampled.
            targets: Y, the same shape, in any floating dtype: the backbone's.

        Returns:
            Itself.

        Raises:
            TypeError, ValueError: An argument is no map, or shapes or devices differ, or channels from batch to batch.

        Memory: float64 copies of both, one after the other.
        """
        op = "Fidelity"
        _checks.map_(op, "predictions", predictions)
        _checks.map_(op, "targets", targets)
        if predictions.shape != targets.shape:
            raise ValueError(
                f"murf_fast.{op}: `predictions` must have the shape of `targets`, {tuple(targets.shape)}, got "
                f"{tuple(predictions.shape)}"
            )
        _checks.same_device(op, "predictions", predictions, "targets", targets)
        channels = targets.shape[1]
        if self._mean is None:
            self._mean = targets.new_zeros(channels, dtype=torch.float64)
            self._spread, self._error = self._mean.clone(), self._mean.clone()
        elif len(self._mean) != channels:
            raise ValueError(
                f"murf_fast.{op}: `targets` must have the channels of the batches before, {len(self._mean)}, got "
                f"{channels}"
            )
        count = targets.numel() // channels
        if count == 0:
            return self
        y = targets.double()
        self._error += (predictions.double() - y).square().sum((0, 2, 3))
        mean = y.mean((0, 2, 3))
        shift, total = mean - self._mean, self._count + count
        self._spread += (y - mean[:, None, None]).square().sum((0, 2, 3))
        self._spread += shift.square() * (self._count * count / total)
        self._mean += shift * (count / total)
        self._count = total
        return self

    def value(self) -> Tensor:
        """A scalar in float64: infinite where every prediction is right (NaN if the targets are constant, too).

        Raises:
            ValueError: Nothing was counted.
        """
        if self._count == 0:
            raise ValueError("murf_fast.Fidelity: `update` must come before `value`: there are no features yet")
        return self._spread.sum() / self._error.sum()
