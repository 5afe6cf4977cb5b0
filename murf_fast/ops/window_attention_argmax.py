"""Labels of attended logits, without the logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from murf_fast import backends, reference
from murf_fast.annotations import Backend, Values
from murf_fast.ops import _checks, _contract
from murf_fast.ops._library import as_float32, float32_rows, register
from murf_fast.ops.upsample_argmax import label_dtype
from murf_fast.ops.window_attention import VALUES, check_attention, requires_attention
from murf_fast.windows import Windows


def window_attention_argmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    windows: Windows,
    num_heads: int,
    values: Values = "mean",
    scale: float | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    class_bias: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """The class of the largest logit that every query attends to; logits of the queries' grid never exist.

    With the weights ``P_n`` of :func:`window_attention` and values ``"mean"``
    ``labels(p) = argmax_k (sum_j mean_n P_n(p, j) v(j) + class_bias)_k``, with ``"split"``
    ``labels(p) = argmax_k (sum_n sum_j P_n(p, j) v_n(j) + class_bias)_k``. Of equal logits the lowest class wins and a
    NaN beats everything, as in ``torch.argmax``.

    A linear head commutes with the attention: ``v`` are the head's logits at low resolution, without its bias. Where
    heads have their own channels (``"split"``), ``v_n`` are the logits that the channels of head n contribute.

    Args:
        q, k, windows, num_heads, scale, bias, backend: As for :func:`window_attention`.
        v: Logits (B, K, h, w), or (B, heads * K, h, w) for ``"split"``.
        values: ``"mean"``: the heads' weights are averaged. ``"split"``: each head weighs logits of its own, and they
            are summed.
        class_bias: (K,), or (B, K) for a bias per image; used in float32.

    Returns:
        Labels (B, H, W): uint8 up to 256 classes, int16 up to 32768, int32 above. No gradients.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        BackendUnavailableError: ``backend`` cannot take this call.

    Memory: the result, and on CPU a few MB per thread, on a GPU at most 128 MB, as :func:`window_attention`.

    Source: ``F.conv2d(upsampler(image, features), weight, bias).argmax(1)``, how AnyUp, JAFAR and NAF are evaluated.
    """
    op = "window_attention_argmax"
    num_heads, scale, rows, columns = check_attention(op, q, k, v, windows, num_heads, values, scale, bias)
    classes = v.shape[1] // (1 if values == "mean" else num_heads)
    _check_class_bias(op, class_bias, classes, q)
    backend = _checks.backend(backend, q)
    if backend == "reference":
        labels, _ = reference.window_attention_argmax(q, k, v, windows, num_heads, values, scale, bias, class_bias)
        return labels.to(label_dtype(classes))
    # Labels have no gradient, and an op without an autograd formula must not see inputs that want one.
    q, k, v, bias_y, bias_x, class_bias = (
        x if x is None else x.detach() for x in (q, k, v, *(bias or (None, None)), class_bias)
    )
    return _window_attention_argmax(
        q, k, v, bias_y, bias_x, class_bias, rows, columns, num_heads, values == VALUES[0], scale, backend
    )


def _check_class_bias(op: str, bias: Any, classes: int, q: Tensor) -> None:
    if bias is None:
        return
    _checks.tensor(op, "class_bias", bias)
    if tuple(bias.shape) not in ((classes,), (q.shape[0], classes)):
        raise ValueError(
            f"murf_fast.{op}: `class_bias` must have shape ({classes},) or ({q.shape[0]}, {classes}), one entry per "
            f"class, got {tuple(bias.shape)}"
        )
    if bias.device != q.device:
        raise ValueError(f"murf_fast.{op}: `class_bias` must be on {q.device}, got {bias.device}")


def _classes(v: Tensor, num_heads: int, mean: bool) -> int:
    return v.shape[1] if mean else v.shape[1] // num_heads


def _requires(op, q, k, v, bias_y, bias_x, class_bias, rows, columns, num_heads, mean, scale, backend) -> None:
    requires_attention(op, q, k, v, bias_y, bias_x, rows, columns, num_heads, mean, scale, False, backend)
    if class_bias is not None:
        classes = _classes(v, num_heads, mean)
        shape = (*(None,) * (len(class_bias.shape) - 1), classes)
        _contract.tensor(op, "class_bias", class_bias, q, shape, _checks.DTYPES)
        _check_class_bias(op, class_bias, classes, q)


def _empty(q, k, v, bias_y, bias_x, class_bias, rows, columns, num_heads, mean, scale, backend) -> Tensor:
    batch, _, height, width = q.shape
    return q.new_empty((batch, height, width), dtype=label_dtype(_classes(v, num_heads, mean)))


def _launch(q, k, v, bias_y, bias_x, class_bias, rows, columns, num_heads, mean, scale, backend, labels) -> None:
    backends.launcher(backend).window_attention_argmax(
        q, k, v, as_float32(bias_y), as_float32(bias_x), float32_rows(class_bias), (rows, columns), num_heads, mean,
        scale, labels
    )  # fmt: skip


def _reference(q, k, v, bias_y, bias_x, class_bias, rows, columns, num_heads, mean, scale, backend) -> Tensor:
    windows, bias = Windows(rows, columns), None if bias_y is None else (bias_y, bias_x)
    values = VALUES[0] if mean else VALUES[1]
    labels, _ = reference.window_attention_argmax(q, k, v, windows, num_heads, values, scale, bias, class_bias)
    return labels.to(label_dtype(_classes(v, num_heads, mean)))


_window_attention_argmax = register(
    "window_attention_argmax(Tensor q, Tensor k, Tensor v, Tensor? bias_y, Tensor? bias_x, Tensor? class_bias, "
    "str rows, str columns, int num_heads, bool mean, float scale, str backend) -> Tensor",
    _requires,
    _empty,
    _launch,
    reference=_reference,
)
