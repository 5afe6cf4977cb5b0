"""Maps resized to one grid and concatenated: one launch per map into its channels of the result."""

from __future__ import annotations

from torch import Tensor

from murf_fast.kernels.resample import Axes
from murf_fast.kernels.upsample_sum import upsample_sum

__all__ = ["upsample_concat"]


def upsample_concat(features: list[Tensor], axes: Axes, out: Tensor) -> None:
    """``out[:, c_s : c_s + C_s] = U_s features[s]``.

    A launch per map keeps tiles of one shape per map, and a result worth a GPU takes longer to write than to launch.
    """
    begin = 0
    for feature, pair in zip(features, axes, strict=True):
        end = begin + feature.shape[1]
        upsample_sum([feature], [pair], None, out[:, begin:end])
        begin = end
