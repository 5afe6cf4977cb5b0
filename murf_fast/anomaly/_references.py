"""Which images of a fit fill the banks: a coreset of images, as SuperAD takes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from murf_fast import _arguments
from murf_fast.anomaly._patches import WHAT, PatchEncoder
from murf_fast.ops.k_center_greedy import k_center_greedy


@torch.no_grad()
def references_of(
    patches: PatchEncoder, images: Any, share: float, progress: Callable[[int, int], None] | None
) -> list[Any]:
    """A share of the images, at least one, in their order: those that :func:`k_center_greedy` selects by CLS tokens.

    The tokens are those of the last of the encoder's layers at its first resolution. Of images without foreground none
    is selected.

    Raises:
        TypeError: ``images`` can be gone through only once.

    Memory: as for a fit, and one token per image.

    Source: SuperAD (Zhang et al. 2025).
    """
    if not _arguments.is_sequence(images):
        raise TypeError(
            f"murf_fast.{WHAT}: `images` must be a list where `references` are chosen of them, got "
            f"{type(images).__name__}"
        )
    last, numbers = len(patches.encoder.layers) - 1, []
    tokens: list[Any] = []
    for i, looked in enumerate(patches.look_at_each(images)):
        if looked.pixels is not None:
            tokens.append(patches.encoder(looked.pixels).cls[last])
            numbers.append(i)
        if progress is not None:
            progress(i + 1, len(images))
    if not tokens:
        raise ValueError(f"murf_fast.{WHAT}: `foreground` covers no patch of any image at any scale")
    chosen = k_center_greedy(torch.cat(tokens), count=max(1, int(share * len(tokens))))
    return [images[numbers[i]] for i in sorted(chosen.tolist())]
