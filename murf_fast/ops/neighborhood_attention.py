"""Attention of every token of a grid to the tokens around it."""

from __future__ import annotations

import functools
import importlib.util
import operator
from typing import Literal

import torch
from torch import Tensor

from murf_fast import windows
from murf_fast.annotations import Backend, Size
from murf_fast.backends import BackendUnavailableError
from murf_fast.ops import _checks
from murf_fast.ops.window_attention import head_scale, window_attention


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: Size,
    stride: Size = 1,
    dilation: Size = 1,
    scale: float | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    backend: Backend | Literal["natten"] | None = None,
) -> Tensor:
    """Attend to a window of ``kernel_size`` tokens around each token, shifted at the borders (NATTEN's ``na2d``).

    ``out_n(p) = sum_j softmax_j(scale <q_n(p), k_n(j)> + bias) v_n(j)`` over the window of p; see
    :func:`murf_fast.windows.neighborhood` for which tokens that is. It is :func:`window_attention` for a grid that
    attends to itself.

    Args:
        q, k: (B, H, W, heads, dim), floating point, any strides, any dim.
        v: (B, H, W, heads, dim_v); any width.
        kernel_size: Tokens of the window per axis, (height, width) or one for both.
        stride: Queries of a run of so many share the window of the middle one.
        dilation: Distance of a window's tokens.
        scale: Factor of the products; ``dim ** -0.5`` if None.
        bias: Rows and columns: slopes (heads,) of a distance bias ``-slope |distance|`` (ALiBi), or tables
            (heads, H, H) and (heads, W, W). None: no bias.
        backend: ``"native"``, ``"triton"``, ``"reference"``, or ``"natten"``, which hands CUDA tensors to an installed
            NATTEN and its kernels. None chooses among the first three from the tensors: NATTEN is chosen by nobody
            until a measurement on a GPU says when it is faster.

    Returns:
        (B, H, W, heads, dim_v) in the dtype of q. Differentiable with respect to q, k, v and bias.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        BackendUnavailableError: ``backend`` cannot take this call.

    Memory: as :func:`window_attention`.

    Source: NATTEN (Hassani et al., Neighborhood Attention Transformer; Generalized Neighborhood Attention for strides).
    """
    op = "neighborhood_attention"
    _check(op, q, k, v)
    grid, heads = tuple(q.shape[1:3]), q.shape[3]
    rule = windows.neighborhood(grid, grid, kernel_size, stride=stride, dilation=dilation)
    scale = head_scale(op, scale, operator.index(q.shape[4]))
    if isinstance(backend, str) and backend == "natten":
        return _natten(q, k, v, kernel_size, stride, dilation, scale, bias)
    tables = None if bias is None else _tables(op, bias, q)
    maps = [x.flatten(3).permute(0, 3, 1, 2) for x in (q, k, v)]
    out = window_attention(
        *maps, windows=rule, num_heads=heads, values="split", scale=scale, bias=tables, backend=backend
    )
    return out.permute(0, 2, 3, 1).unflatten(3, (heads, v.shape[4]))


def _check(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"murf_fast.{op}: `{name}` must be a tensor, got {type(x).__name__}")
        if x.dtype not in _checks.DTYPES:
            raise TypeError(f"murf_fast.{op}: `{name}` must be floating point, got {x.dtype}")
        _checks.dense(op, name, x)
        if x.ndim != 5 or min(x.shape[1:]) < 1:
            raise ValueError(f"murf_fast.{op}: `{name}` must be (B, H, W, heads, dim), got shape {tuple(x.shape)}")
        _checks.same_device_and_dtype(op, name, x, "q", q)
        same = 4 if name == "v" else 5
        if x.shape[:same] != q.shape[:same]:
            raise ValueError(
                f"murf_fast.{op}: `{name}` must have the sizes of `q`, {tuple(q.shape[:same])}, got "
                f"{tuple(x.shape[:same])}"
            )


def _tables(op: str, bias: object, q: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(bias, (tuple, list)) or len(bias) != 2:
        raise TypeError(f"murf_fast.{op}: `bias` must be a pair of tensors (rows, columns), got {type(bias).__name__}")
    tables = []
    for i, (b, n) in enumerate(zip(bias, q.shape[1:3], strict=True)):
        _checks.tensor(op, f"bias[{i}]", b)
        if tuple(b.shape) == (q.shape[3],):
            # At their value, in the dtype of the arithmetic.
            b = b.to(torch.promote_types(torch.promote_types(q.dtype, b.dtype), torch.float32))
            at = torch.arange(n, device=q.device, dtype=b.dtype)
            b = -b[:, None, None] * (at[:, None] - at).abs()
        elif tuple(b.shape) != (q.shape[3], n, n):
            raise ValueError(
                f"murf_fast.{op}: `bias[{i}]` must have shape ({q.shape[3]},) or {(q.shape[3], n, n)}, got "
                f"{tuple(b.shape)}"
            )
        tables.append(b)
    return tuple(tables)


def _natten(q, k, v, kernel_size, stride, dilation, scale, bias) -> Tensor:
    reasons = []
    if q.device.type != "cuda":
        reasons.append(f"it is used for CUDA tensors, these are on {q.device}")
    if bias is not None:
        reasons.append("it takes no bias")
    if importlib.util.find_spec("natten") is None:
        reasons.append("natten is not installed (`pip install natten`)")
    elif not _natten_kernels():
        reasons.append("natten is installed without its kernels (libnatten)")
    if reasons:
        raise BackendUnavailableError("murf_fast: backend 'natten' was asked for, but: " + "; ".join(reasons))
    from natten import na2d

    return na2d(q, k, v, kernel_size=kernel_size, stride=stride, dilation=dilation, scale=scale)


@functools.cache
def _natten_kernels() -> bool:
    import natten

    return bool(getattr(natten, "HAS_LIBNATTEN", False))
