"""Windows of an image that overlap by half, and the map of what was made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast.annotations import Mode
from murf_fast.ops.resize import resize


def cut(images: Tensor, factor: int, size: tuple[int, int], mode: Mode, antialias: bool) -> Tensor:
    """((2 factor - 1)^2 B, 3, *size), window-major and batch-minor: images resized to ``factor`` times that size."""
    height, width = size
    whole = (factor * height, factor * width)
    if tuple(images.shape[2:]) != whole:
        images = resize(images, whole, mode=mode, antialias=antialias)
    windows = images.unfold(2, height, height // 2).unfold(3, width, width // 2)
    return windows.permute(2, 3, 0, 1, 4, 5).flatten(0, 2)


def merged(windows: Tensor, factor: int, batch: int) -> Tensor:
    """(B, D, factor h, factor w) from windows (n n B, D, h, w) in the order of :func:`cut`: the mean where several
    meet, computed in float32 at least.
    """
    n, (height, width) = 2 * factor - 1, windows.shape[2:]
    if n == 1:
        return windows
    shape = (batch, windows.shape[1], factor * height, factor * width)
    dtype = torch.promote_types(windows.dtype, torch.float32)
    total = torch.zeros(shape, dtype=dtype, device=windows.device).contiguous(memory_format=torch.channels_last)
    for i, window in enumerate(windows.split(batch)):
        y, x = i // n * (height // 2), i % n * (width // 2)
        total[:, :, y : y + height, x : x + width] += window
    rows, columns = (_counts(factor, m, total) for m in (height, width))
    return total.div_(rows[:, None] * columns).to(windows.dtype)


def _counts(factor: int, size: int, like: Tensor) -> Tensor:
    """Windows that every cell of an axis lies in: one at both ends, two between."""
    counts = torch.full((factor * size,), 2, dtype=like.dtype, device=like.device)
    counts[: size // 2] = counts[-(size // 2) :] = 1
    return counts
