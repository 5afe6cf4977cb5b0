"""The gradient of a resize is a resize with the transposed tables: a gather, without atomics, hence deterministic."""

from __future__ import annotations

from torch import Tensor

from murf_fast.kernels.upsample_sum import upsample_sum
from murf_fast.tables.resize import AxisTable

__all__ = ["resize_adjoint"]


def resize_adjoint(grad: Tensor, axes: tuple[AxisTable, AxisTable], out: Tensor) -> None:
    """``out = U_h^T grad U_w``. Every gradient value is read once per cell that it came from; most reads hit L2."""
    upsample_sum([grad], [(axes[0].transposed, axes[1].transposed)], None, out)
