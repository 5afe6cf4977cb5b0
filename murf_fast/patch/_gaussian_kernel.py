"""The sigma behind a convolution's kernel."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from murf_fast.patch._state import State
from murf_fast.tables.gaussian import gaussian_taps

# Taps that tell sigma: far from the middle, where a rounding changes the logarithm little, but not yet tiny in float16.
_RATIO = 0.01
# A sigma of few digits, as people write them, is tried first: roundings of the kernel change the digits behind.
_DIGITS = (2, 4, 9)
# Of the largest weight, in roundings of its dtype: what a kernel computed in that dtype may differ by.
_ROUNDINGS = 4
_known: weakref.WeakKeyDictionary[nn.Module, tuple[State, float | None]] = weakref.WeakKeyDictionary()


def sigma_of(blur: Any) -> float | None:
    """Of a blur whose ``kernel`` (C, 1, n, n) is a normalized Gaussian, cut off at four sigma, in every channel; else
    None. Reading a kernel waits for its device, so each is read once, and again when it has changed.
    """
    kernel = blur.kernel
    if kernel.is_inference():  # changes could not be seen
        return _read(kernel)
    if blur not in _known or not _known[blur][0].is_of(kernel):
        _known[blur] = State.of(kernel), _read(kernel)
    return _known[blur][1]


def _read(kernel: Tensor) -> float | None:
    eps = torch.finfo(kernel.dtype).eps
    kernels = kernel.detach().double().cpu().numpy()
    one, n = kernels[0, 0], kernels.shape[-1]
    if one.shape != (n, n) or n % 2 == 0 or not np.array_equal(kernels, np.broadcast_to(one, kernels.shape)):
        return None
    largest = one[n // 2, n // 2]
    if not largest > 0:
        return None
    ratios = one[n // 2, n // 2 + 1 :] / largest
    distance = int((ratios >= _RATIO).sum())
    if distance == 0 or not _RATIO <= ratios[distance - 1] < 1:
        return None
    sigma = distance / math.sqrt(-2 * math.log(ratios[distance - 1]))
    for candidate in (float(f"{sigma:.{digits}g}") for digits in _DIGITS):
        _, taps = gaussian_taps(2 * n, candidate, "reflect")
        if len(taps) == n and np.abs(np.outer(taps, taps) - one).max() <= _ROUNDINGS * eps * largest:
            return candidate
    return None
