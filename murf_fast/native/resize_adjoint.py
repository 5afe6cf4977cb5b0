"""The transpose of a resize."""

from __future__ import annotations

from torch import Tensor

from murf_fast import _fork
from murf_fast._extension import module
from murf_fast.native._address import dense, dtype_tag, same_shape
from murf_fast.native._maps import Maps, is_channels_last
from murf_fast.tables.resize import AxisTable

__all__ = ["resize_adjoint"]


def resize_adjoint(grad: Tensor, axes: tuple[AxisTable, AxisTable], out: Tensor) -> None:
    """``out = U_h^T grad U_w``: gradient (B, C, H, W), result (B, C, h, w)."""
    channels_last = is_channels_last(out)
    maps = Maps([grad], [axes], channels_last)
    same_shape(out, (*grad.shape[:2], axes[0].in_size, axes[1].in_size))
    address = dense(out, maps.dtype)
    module().resize_adjoint(dtype_tag(out), maps.tuples[0], out.shape[0], address, channels_last, _fork.threads())
