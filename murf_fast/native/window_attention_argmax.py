"""Labels of attended logits."""

from __future__ import annotations

from torch import Tensor

from murf_fast import _fork
from murf_fast.native._address import address, dtype_tag, extension
from murf_fast.native._maps import bias_of
from murf_fast.native.upsample_argmax import LABELS
from murf_fast.native.window_attention import attention_of
from murf_fast.tables.query_blocks import forward_blocks_of

__all__ = ["window_attention_argmax"]


def window_attention_argmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_y: Tensor | None,
    bias_x: Tensor | None,
    class_bias: Tensor | None,
    rule: tuple[str, str],
    heads: int,
    mean: bool,
    scale: float,
    labels: Tensor,
) -> None:
    """As :func:`window_attention`, whose result are logits, or those of the heads if they are split; ``labels``: where
    their sum plus ``class_bias`` (1, K) or (B, K) float32 is largest, dense (B, H, W).
    """
    (batch, channels), (height, width) = v.shape[:2], q.shape[2:]
    if labels.dtype not in LABELS:
        raise TypeError(f"murf_fast: labels must be uint8, int16 or int32 for a kernel, got {labels.dtype}")
    classes = channels if mean else channels // heads
    extension.window_attention_argmax(
        dtype=dtype_tag(q.dtype),
        attention=attention_of(forward_blocks_of, q, k, v, bias_y, bias_x, rule, heads, mean, scale),
        bias=bias_of(class_bias, (batch, classes, height, width)),
        label_bytes=labels.element_size(),
        labels=address(labels, labels.dtype, batch * height * width),
        threads=_fork.threads(),
    )
