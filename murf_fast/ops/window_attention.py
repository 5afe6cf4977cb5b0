"""Attention of a fine grid of queries to windows of a coarser grid of keys and values."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal, overload

import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast._layout import is_channels_last
from murf_fast.annotations import Backend, Values
from murf_fast.ops import _checks, _contract
from murf_fast.ops._derivatives import reference_second_derivative
from murf_fast.ops._library import as_float32, empty_map, layout_of, register
from murf_fast.tables.query_blocks import blocks_of
from murf_fast.windows import Windows, axis_window

VALUES = ("mean", "split")


@overload
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    windows: Windows,
    num_heads: int,
    values: Values = "mean",
    scale: float | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    return_lse: Literal[False] = False,
    backend: Backend | None = None,
) -> Tensor: ...
@overload
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    windows: Windows,
    num_heads: int,
    values: Values = "mean",
    scale: float | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    return_lse: Literal[True],
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    windows: Windows,
    num_heads: int,
    values: Values = "mean",
    scale: float | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    return_lse: bool,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    windows: Windows,
    num_heads: int,
    values: Values = "mean",
    scale: float | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Let every query attend to the keys of its window, without a mask, upsampled keys or a tensor of scores.

    ``s_n(p, j) = scale <q_n(p), k_n(j)> + bias_y[n, y, j_y] + bias_x[n, x, j_x]``,
    ``P_n(p, .) = softmax over the window of p``; with values ``"mean"``
    ``out(p) = sum_j mean_n P_n(p, j) v(j)``, with ``"split"`` ``out_n(p) = sum_j P_n(p, j) v_n(j)``.

    Args:
        q: Queries (B, heads * D, H, W), floating point, any strides. ViT tokens (B, H, W, heads * D) are
            ``tokens.permute(0, 3, 1, 2)``, which is channels_last and the fast layout. Any D.
        k: Keys (B, heads * D, h, w) on a grid of their own.
        v: Values (B, C, h, w); any C for ``"mean"``, a multiple of the heads for ``"split"``.
        windows: A rule of :mod:`murf_fast.windows`. A key that a window names twice counts twice.
        num_heads: Heads; contiguous groups of channels.
        values: ``"mean"``: every head weighs all values and the heads are averaged (AnyUp, JAFAR). ``"split"``: each
            head has its share of the channels (NAF, and attention as usual).
        scale: Factor of the products; ``D ** -0.5`` if None.
        bias: Tensors (heads, H, h) and (heads, W, w), added to the scores; used in float32. None: no bias.
        return_lse: Also return the logarithm of each softmax's denominator.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None chooses from the tensors.

    Returns:
        (B, C, H, W) in the dtype and memory format of q; with ``return_lse`` also (B, heads, H, W) in float32. Both
        differentiable with respect to q, k, v and bias; gradients are deterministic.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        BackendUnavailableError: ``backend`` cannot take this call.

    Queries are attended in blocks, which share the keys that any of them reads: where an entry of k or v is not finite,
    so may be the results of queries of its block whose own window does not hold it.

    Memory: the result, and on CPU a few MB per thread: results of a block of at most 256 queries, and its scores with
    at most 960 keys, however many there are. Backward: the gradients, float32 partial sums of the gradients of k and v,
    as large as the largest tensor at most, on CPU a few MB per thread, too: what belongs to a block of at most 64
    queries, and its scores with a run of its keys, 512 KB; and on a GPU three float32 numbers per query and head. On a
    GPU, where heads share values and 8 x 8 queries read more than 64 keys, 128 MB of averaged weights at most.

    Source: AnyUp's and JAFAR's cross attention (heads averaged, raw values), NAF's (values split), FeatSharp's.
    """
    op = "window_attention"
    num_heads, scale, rows, columns = check_attention(op, q, k, v, windows, num_heads, values, scale, bias)
    _checks.flag(op, "return_lse", return_lse)
    backend = _checks.backend(backend, q)
    if backend == "reference":
        result, lse = _by_definition(q, k, v, windows, num_heads, values, scale, bias)
    else:
        bias_y, bias_x = (None, None) if bias is None else bias
        result, lse = _window_attention(
            q, k, v, bias_y, bias_x, rows, columns, num_heads, values == "mean", scale, return_lse, backend
        )
    return (result, lse) if return_lse else result


def check_attention(
    op: str,
    q: Any,
    k: Any,
    v: Any,
    windows: Any,
    num_heads: Any,
    values: Any,
    scale: Any,
    bias: Any,
) -> tuple[int, float, str, str]:
    """Heads, scale and the windows of rows and columns of a call whose arguments fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _checks.map_(op, name, x)
        _checks.same_device_and_dtype(op, name, x, "q", q)
        if x.shape[0] != q.shape[0]:
            raise ValueError(
                f"murf_fast.{op}: `{name}` must have the batch size of `q`, {q.shape[0]}, got {x.shape[0]}"
            )
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"murf_fast.{op}: `k` must have the channels of `q`, {q.shape[1]}, got {k.shape[1]}")
    if v.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"murf_fast.{op}: `v` must have the grid of `k`, {tuple(k.shape[2:])}, got {tuple(v.shape[2:])}"
        )
    num_heads = _checks.integer(op, "num_heads", num_heads)
    if num_heads < 1 or q.shape[1] % num_heads:
        raise ValueError(f"murf_fast.{op}: `num_heads` must divide the {q.shape[1]} channels of `q`, got {num_heads!r}")
    _checks.choice(op, "values", values, VALUES)
    if values == "split" and v.shape[1] % num_heads:
        raise ValueError(
            f"murf_fast.{op}: `num_heads` must divide the {v.shape[1]} channels of `v` for values='split', "
            f"got {num_heads}"
        )
    scale = head_scale(op, scale, q.shape[1] // num_heads)
    rows, columns = _check_windows(op, windows, q, k)
    _check_bias(op, bias, num_heads, q, k)
    return num_heads, scale, rows, columns


def head_scale(op: str, scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if scale is None else _checks.number(op, "scale", scale)


def _check_windows(op: str, windows: object, q: Tensor, k: Tensor) -> tuple[str, str]:
    if not isinstance(windows, Windows):
        raise TypeError(f"murf_fast.{op}: `windows` must be a rule of murf_fast.windows, got {type(windows).__name__}")
    for name, made, have, of in (("out", windows.out, q.shape[2:], "q"), ("grid", windows.grid, k.shape[2:], "k")):
        if made is not None and tuple(made) != tuple(have):
            raise ValueError(
                f"murf_fast.{op}: `windows` must be made for the sizes of the tensors: its {name} is {tuple(made)}, "
                f"`{of}` has {tuple(have)}"
            )
    clamped = "clamped" in (windows.rows.split()[0], windows.columns.split()[0])
    if clamped and tuple(q.shape[2:]) != tuple(k.shape[2:]):
        raise ValueError(
            f"murf_fast.{op}: `windows` of a radius need one grid for queries and keys, got {tuple(q.shape[2:])} and "
            f"{tuple(k.shape[2:])}"
        )
    return windows.rows, windows.columns


def _check_bias(op: str, bias: object, heads: int, q: Tensor, k: Tensor) -> None:
    if bias is None:
        return
    if not isinstance(bias, (tuple, list)) or len(bias) != 2:
        raise TypeError(f"murf_fast.{op}: `bias` must be a pair of tensors (rows, columns), got {type(bias).__name__}")
    for name, b, shape in zip(
        ("bias[0]", "bias[1]"), bias, ((heads, q.shape[2], k.shape[2]), (heads, q.shape[3], k.shape[3])), strict=True
    ):
        _checks.tensor(op, name, b)
        if tuple(b.shape) != shape:
            raise ValueError(f"murf_fast.{op}: `{name}` must have shape {shape}, got {tuple(b.shape)}")
        if b.device != q.device:
            raise ValueError(f"murf_fast.{op}: `{name}` must be on {q.device}, got {b.device}")


@lru_cache(256)
def _is_window_rule(spec: str, out: int, size: int) -> bool:
    """Whether a rule names, for each of ``out`` queries, one or more of ``size`` keys."""
    try:
        window = axis_window(spec, out, size)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        if str(error).startswith("murf_fast.windows"):
            raise  # says more than that it is no rule: which argument of the rule leaves a query without a key
        return False
    index, count = window.index, window.count
    fits = window.size == size and len(index) == len(count) == out and index.shape[1] >= 1
    return bool(
        fits and (count >= 1).all() and (count <= index.shape[1]).all() and (index >= 0).all() and (index < size).all()
    )


def requires_attention(op, q, k, v, bias_y, bias_x, rows, columns, num_heads, mean, scale, return_lse, backend) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _contract.map_(op, name, x)
    _contract.backend(op, backend, q)
    _contract.tensor(op, "k", k, q, (*q.shape[:2], None, None), (q.dtype,))
    _contract.tensor(op, "v", v, q, (q.shape[0], None, *k.shape[2:]), (q.dtype,))
    if num_heads < 1 or q.shape[1] % num_heads or (not mean and v.shape[1] % num_heads):
        raise ValueError(f"murf_fast.{op}: `num_heads` must divide the channels, got {num_heads}")
    if not math.isfinite(scale):
        raise ValueError(f"murf_fast.{op}: `scale` must be finite, got {scale!r}")
    for name, spec, out, size in (("rows", rows, q.shape[2], k.shape[2]), ("columns", columns, q.shape[3], k.shape[3])):
        if not _is_window_rule(spec, out, size):
            raise ValueError(f"murf_fast.{op}: `{name}` must be a rule for {out} queries and {size} keys, got {spec!r}")
    for name, bias, axis in (("bias_y", bias_y, 2), ("bias_x", bias_x, 3)):
        if bias is not None:
            _contract.tensor(op, name, bias, q, (num_heads, q.shape[axis], k.shape[axis]), _checks.DTYPES)
    if (bias_y is None) != (bias_x is None):
        raise ValueError(f"murf_fast.{op}: `bias_y` and `bias_x` must be given together")


def _empty(q, k, v, bias_y, bias_x, rows, columns, num_heads, mean, scale, return_lse, backend) -> tuple[Any, ...]:
    batch, _, height, width = q.shape
    out = empty_map(q, (batch, v.shape[1], height, width), is_channels_last(q))
    return out, q.new_empty((batch, num_heads, height, width) if return_lse else (0,), dtype=torch.float32)


def _launch(q, k, v, bias_y, bias_x, rows, columns, num_heads, mean, scale, return_lse, backend, results) -> None:
    out, lse = results
    backends.launcher(backend).window_attention(
        q, k, v, as_float32(bias_y), as_float32(bias_x), (rows, columns), num_heads, mean, scale, out,
        lse if return_lse else None
    )  # fmt: skip


def _by_definition(q, k, v, windows, num_heads, values, scale, bias) -> tuple[Tensor, Tensor]:
    result, lse = reference.window_attention(q, k, v, windows, num_heads, values, scale, bias, True)
    return result.to(q.dtype).contiguous(memory_format=layout_of(is_channels_last(q))), lse


def _reference(
    q, k, v, bias_y, bias_x, rows, columns, num_heads, mean, scale, return_lse, backend
) -> tuple[Tensor, Tensor]:
    windows, bias = Windows(rows, columns), None if bias_y is None else (bias_y, bias_x)
    result, lse = _by_definition(q, k, v, windows, num_heads, VALUES[0] if mean else VALUES[1], scale, bias)
    return result, lse if return_lse else lse.new_empty((0,))


def _backward(wanted, arguments, grad_out, grad_lse):
    *inputs, return_lse, backend = arguments
    wanted = list(wanted[:5])
    gradients = _gradient(grad_out, grad_lse if return_lse else None, *inputs, wanted, backend)
    return [g if needed else None for g, needed in zip(gradients, wanted, strict=True)]


def shares(rows: str, columns: str, q: Tensor, k: Tensor, v: Tensor, bias: bool) -> int:
    """Runs of row blocks whose gradients of keys and values are summed apart: at most 32, and as few as keep all
    sums within the largest tensor. Depends on shapes alone, and with it the order of every sum.
    """
    (height, width), (h, w) = tuple(q.shape[2:]), tuple(k.shape[2:])
    y, _ = blocks_of(rows, columns, (height, width), (h, w))
    largest = max(x[:1].numel() for x in (q, k, v)) + v.shape[1] * height * width
    taps = axis_window(rows, height, h).taps
    count = 1
    while count < min(len(y), 32):
        more = min(2 * count, len(y))
        sums = min(more * (taps + -(-h // more)), more * h) * w * (k.shape[1] + v.shape[1])
        if bias:
            sums += more * k.shape[1] * (height * h + width * w)
        if sums > largest:
            break
        count = more
    return count


def _gradient_requires(
    op, grad_out, grad_lse, q, k, v, bias_y, bias_x, rows, columns, num_heads, mean, scale, wanted, backend
) -> None:
    requires_attention(op, q, k, v, bias_y, bias_x, rows, columns, num_heads, mean, scale, False, backend)
    _contract.tensor(op, "grad_out", grad_out, q, (q.shape[0], v.shape[1], *q.shape[2:]), (q.dtype,))
    if grad_lse is not None:
        shape = (q.shape[0], num_heads, *q.shape[2:])
        _contract.tensor(op, "grad_lse", grad_lse, q, shape, _checks.DTYPES)
    _contract.count(op, "wanted", wanted, 5)
    if any(wanted[3:]) and bias_y is None:
        raise ValueError(f"murf_fast.{op}: `wanted` asks for the gradient of a bias that is not given")


def _gradient_empty(
    grad_out, grad_lse, q, k, v, bias_y, bias_x, rows, columns, num_heads, mean, scale, wanted, backend
) -> list[Tensor]:
    """An unwanted gradient is empty; those of the biases come together."""
    either = wanted[3] or wanted[4]
    shapes = [x.shape if n else (0, 1, 1, 1) for x, n in zip((q, k, v), wanted[:3], strict=True)]
    maps = [empty_map(x, shape, is_channels_last(x)) for x, shape in zip((q, k, v), shapes, strict=True)]
    tables = [q.new_empty((0,)) if b is None or not either else b.new_empty(b.shape) for b in (bias_y, bias_x)]
    return [*maps, *tables]


def _gradient_launch(
    grad_out, grad_lse, q, k, v, bias_y, bias_x, rows, columns, num_heads, mean, scale, wanted, backend, results
) -> None:
    backends.launcher(backend).window_attention_backward(
        grad_out, as_float32(grad_lse), q, k, v, as_float32(bias_y), as_float32(bias_x), (rows, columns), num_heads,
        mean, scale, shares(rows, columns, q, k, v, wanted[3] or wanted[4]), results
    )  # fmt: skip


def _gradient_backward(_, arguments, directions):
    grad_out, grad_lse, *inputs, rows, columns, num_heads, mean, scale, wanted, _ = arguments
    windows, values = Windows(rows, columns), VALUES[0] if mean else VALUES[1]

    def attention(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        return reference.window_attention(q, k, v, windows, num_heads, values, scale, bias or None, True)

    of_grads, of_inputs = reference_second_derivative(attention, inputs, [grad_out, grad_lse], directions, wanted)
    return *of_grads, *of_inputs


_window_attention = register(
    "window_attention(Tensor q, Tensor k, Tensor v, Tensor? bias_y, Tensor? bias_x, str rows, str columns, "
    "int num_heads, bool mean, float scale, bool return_lse, str backend) -> (Tensor, Tensor)",
    requires_attention,
    _empty,
    _launch,
    _backward,
    reference=_reference,
)
_gradient = register(
    "window_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? bias_y, "
    "Tensor? bias_x, str rows, str columns, int num_heads, bool mean, float scale, bool[] wanted, str backend) "
    "-> Tensor[]",
    _gradient_requires,
    _gradient_empty,
    _gradient_launch,
    _gradient_backward,
)
