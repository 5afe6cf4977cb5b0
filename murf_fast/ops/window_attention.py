"""Attention of a fine grid of queries to windows of a coarser grid of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from murf_fast import backends, reference
from murf_fast.ops import _checks
from murf_fast.ops._derivatives import reference_second_derivative
from murf_fast.ops._library import empty_map, is_channels_last, register
from murf_fast.tables.query_blocks import blocks_of
from murf_fast.windows import Windows, axis_window

VALUES = ("mean", "split")


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    windows: Windows,
    num_heads: int,
    values: str = "mean",
    scale: float | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    return_lse: bool = False,
    backend: str | None = None,
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

    Memory: the result, and the scores of one block of at most 64 queries per thread. Backward: the gradients, and on
    CPU float32 partial sums of the gradients of k and v, as large as the largest tensor at most. Queries with similar
    windows are processed together, so a key or value that is not finite can also reach queries whose windows end next
    to it.

    Source: AnyUp's and JAFAR's cross attention (heads averaged, raw values), NAF's (values split), FeatSharp's.
    """
    op = "window_attention"
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
    _checks.flag(op, "return_lse", return_lse)
    if values == "split" and v.shape[1] % num_heads:
        raise ValueError(
            f"murf_fast.{op}: `num_heads` must divide the {v.shape[1]} channels of `v` for values='split', "
            f"got {num_heads}"
        )
    scale = _scale(op, scale, q.shape[1] // num_heads)
    rows, columns = _rule(op, windows, q, k)
    _bias(op, bias, num_heads, q, k)
    backend = backends.resolve(backend, q.device.type, q.dtype)
    if backend == "reference":
        result, lse = reference.window_attention(q, k, v, windows, num_heads, values, scale, bias, True)
        layout = torch.channels_last if is_channels_last(q) else torch.contiguous_format
        result = result.to(q.dtype).contiguous(memory_format=layout)
    else:
        bias_y, bias_x = (None, None) if bias is None else bias
        result, lse = torch.ops.murf_fast.window_attention(
            q, k, v, bias_y, bias_x, rows, columns, num_heads, values == "mean", scale, return_lse, backend
        )
    return (result, lse) if return_lse else result


def _scale(op: str, scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    return _checks.number(op, "scale", scale)


def _rule(op: str, windows: object, q: Tensor, k: Tensor) -> tuple[str, str]:
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


def _bias(op: str, bias: object, heads: int, q: Tensor, k: Tensor) -> None:
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


def _plain(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to(torch.float32).contiguous()


def _forward(q, k, v, bias_y, bias_x, rows, columns, num_heads, mean, scale, return_lse, backend):
    out, lse = _fake(q, k, v, bias_y, bias_x, rows, columns, num_heads, mean, scale, return_lse, backend)
    if out.numel():
        backends.launcher(backend).window_attention(
            q, k, v, _plain(bias_y), _plain(bias_x), (rows, columns), num_heads, mean, scale, out,
            lse if return_lse else None
        )  # fmt: skip
    return out, lse


def _fake(q, k, v, bias_y, bias_x, rows, columns, num_heads, mean, scale, return_lse, backend):
    batch, _, height, width = q.shape
    out = empty_map(q, (batch, v.shape[1], height, width), is_channels_last(q))
    lse_shape = (batch, num_heads, height, width) if return_lse else (0,)
    return out, q.new_empty(lse_shape, dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, bias_y, bias_x, ctx.rows, ctx.columns, ctx.num_heads, ctx.mean, ctx.scale, ctx.lse, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, bias_y, bias_x)


def _backward(ctx, grad_out, grad_lse):
    q, k, v, bias_y, bias_x = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:5])
    gradients = torch.ops.murf_fast.window_attention_backward(
        grad_out,
        grad_lse if ctx.lse else None,
        q,
        k,
        v,
        bias_y,
        bias_x,
        ctx.rows,
        ctx.columns,
        ctx.num_heads,
        ctx.mean,
        ctx.scale,
        wanted,
        ctx.backend,
    )
    return *[g if needed else None for g, needed in zip(gradients, wanted, strict=True)], *[None] * 7


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


def _gradients(
    grad_out, grad_lse, q, k, v, bias_y, bias_x, rows, columns, num_heads, mean, scale, wanted, backend
) -> list[Tensor]:
    results = _gradients_fake(
        grad_out, grad_lse, q, k, v, bias_y, bias_x, rows, columns, num_heads, mean, scale, wanted, backend
    )
    if grad_out.numel():
        grad_lse = None if grad_lse is None else grad_lse.to(torch.float32).contiguous()
        backends.launcher(backend).window_attention_backward(
            grad_out, grad_lse, q, k, v, _plain(bias_y), _plain(bias_x), (rows, columns), num_heads, mean, scale,
            shares(rows, columns, q, k, v, wanted[3] or wanted[4]), results
        )  # fmt: skip
    else:
        for result in results:
            result.zero_()
    return results


def _gradients_fake(
    grad_out, grad_lse, q, k, v, bias_y, bias_x, rows, columns, num_heads, mean, scale, wanted, backend
) -> list[Tensor]:
    maps = [
        empty_map(x, x.shape if n else (0, 1, 1, 1), is_channels_last(x))
        for x, n in zip((q, k, v), wanted, strict=False)
    ]
    either = wanted[3] or wanted[4]
    tables = [q.new_empty((0,)) if b is None or not either else b.new_empty(b.shape) for b in (bias_y, bias_x)]
    return [*maps, *tables]


def _gradients_setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.rows, ctx.columns, ctx.num_heads, ctx.mean, ctx.scale, ctx.wanted, _ = inputs
    ctx.save_for_backward(*tensors)


def _gradients_backward(ctx, directions):
    grad_out, grad_lse, *inputs = ctx.saved_tensors
    values = VALUES[0] if ctx.mean else VALUES[1]

    def attention(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        rule = Windows(ctx.rows, ctx.columns)
        return reference.window_attention(q, k, v, rule, ctx.num_heads, values, ctx.scale, bias or None, True)

    of_grads, of_inputs = reference_second_derivative(attention, inputs, [grad_out, grad_lse], directions, ctx.wanted)
    return *of_grads, *of_inputs, *[None] * 7


register(
    "window_attention(Tensor q, Tensor k, Tensor v, Tensor? bias_y, Tensor? bias_x, str rows, str columns, "
    "int num_heads, bool mean, float scale, bool return_lse, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _backward,
    _setup_context,
)
register(
    "window_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? bias_y, "
    "Tensor? bias_x, str rows, str columns, int num_heads, bool mean, float scale, bool[] wanted, str backend) "
    "-> Tensor[]",
    _gradients,
    _gradients_fake,
    _gradients_backward,
    _gradients_setup_context,
)
