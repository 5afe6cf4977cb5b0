"""Maps whose channels can be loaded as vectors: side by side, and every pixel on a multiple of 16 elements.

The 150 classes of a segmentation begin on every second element, and what is masked by 150 channels is loaded one by
one: 84 loads of a value where 11 of eight would do.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from murf_fast.kernels import launch

VECTOR = 16  # elements; what Triton knows of a pointer or a stride is whether it is a multiple of 16
# A copy writes and reads each value once; a kernel reads it at least four times for every fourth of the result's.
SMALLEST_FACTOR = 4


def aligned_maps(features: Sequence[Tensor], pixels: int) -> tuple[list[Tensor], int]:
    """The maps for a result of ``pixels`` pixels an image, and how many channels of a pixel may be read.

    Where one is not aligned, all are copied that are not, with room for whole vectors, if the result is four times as
    large as each of them. Else they stay as they are.
    """
    channels = features[0].shape[1]
    padded = launch.cdiv(channels, VECTOR) * VECTOR
    if padded == channels and all(map(_is_aligned, features)):
        return list(features), channels
    if any(SMALLEST_FACTOR * f.shape[2] * f.shape[3] > pixels for f in features):
        return list(features), channels
    return [f if f.shape[1] == padded and _is_aligned(f) else _copy(f, padded) for f in features], padded


def _is_aligned(x: Tensor) -> bool:
    return x.stride(1) == 1 and all(x.stride(i) % VECTOR == 0 for i in (0, 2, 3)) and x.data_ptr() % VECTOR == 0


def _copy(x: Tensor, padded: int) -> Tensor:
    batch, channels, height, width = x.shape
    copy = x.new_empty(batch, height, width, padded).permute(0, 3, 1, 2)
    copy[:, :channels].copy_(x)
    return copy
