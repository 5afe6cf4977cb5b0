"""The transpose of a resize."""

from __future__ import annotations

from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import dense, dtype_tag, extension, same_shape
from murf_fast.native._maps import maps_of
from murf_fast.tables.resize import AxisTable

__all__ = ["resize_adjoint"]


def resize_adjoint(grad: Tensor, axes: tuple[AxisTable, AxisTable], out: Tensor) -> None:
    """``out = U_h^T grad U_w``: gradient (B, C, H, W), result (B, C, h, w)."""
    same_shape(out, (*grad.shape[:2], axes[0].in_size, axes[1].in_size))
    data, channels_last = dense(out, grad.dtype)
    maps, _copies = maps_of([grad], [axes], channels_last)
    extension.resize_adjoint(
        dtype=dtype_tag(out.dtype),
        grad=maps[0],
        batch=out.shape[0],
        out=data,
        channels_last=channels_last,
        threads=_fork.threads(),
    )
