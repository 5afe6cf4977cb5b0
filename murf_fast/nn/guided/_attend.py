"""Values, or a linear head of them, weighed with the attention of an image's queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast.annotations import Reduce, Values
from murf_fast.ops._derivatives import writes_nothing
from murf_fast.ops.upsample_argmax import label_dtype
from murf_fast.ops.window_attention import window_attention
from murf_fast.ops.window_attention_argmax import window_attention_argmax
from murf_fast.windows import Windows

REDUCTIONS = ("softmax", "argmax")
# Bytes of the channels that are attended for a band of rows before they are reduced: they should stay in a CPU's cache,
# and fill a GPU.
_BAND_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}


class Attention(NamedTuple):
    """Queries (B, D, H, W), keys (B, D, h, w), and which see which; ``values`` as for ``window_attention``."""

    queries: Tensor
    keys: Tensor
    rule: Windows
    num_heads: int
    values: Values

    def __call__(self, v: Tensor) -> Tensor:
        """(B, C, H, W) of values (B, C, h, w)."""
        return window_attention(
            self.queries, self.keys, v, windows=self.rule, num_heads=self.num_heads, values=self.values
        )

    def labels(self, v: Tensor) -> Tensor:
        """(B, H, W) of logits (B, K, h, w), or of those that each head contributes."""
        return window_attention_argmax(
            self.queries, self.keys, v, windows=self.rule, num_heads=self.num_heads, values=self.values
        )

    def rows(self, begin: int, end: int) -> Attention:
        """That of the queries of some rows."""
        height, width = self.queries.shape[2:]
        rule = self.rule.crop(begin, 0, end - begin, width, out=(height, width))
        return self._replace(queries=self.queries[:, :, begin:end], rule=rule)

    def keys_of_a_query(self) -> int:
        """At most."""
        rows, columns = self.rule.tables(tuple(self.queries.shape[2:]), tuple(self.keys.shape[2:]))
        return rows.taps * columns.taps


def predicted(
    attention: Attention, features: Tensor, weight: Tensor, bias: Tensor | None, reduce: Reduce | None
) -> Tensor:
    """Logits (B, K, H, W) of a linear head (K, C) on what ``attention`` makes of features (B, C, h, w), or their
    softmax, or labels (B, H, W). Where the head comes first, labels leave no logits behind; where it comes last, they
    come band by band of rows, as do logits of which more channels are attended than there are classes.
    """
    maps, finish = _head(attention, features, weight, bias)
    if reduce is None and finish is None:
        return attention(maps)
    if reduce == "argmax" and maps is not features:
        return attention.labels(maps)

    def band(part: Attention) -> Tensor:
        logits = part(maps)
        logits = logits if finish is None else finish(logits)
        if reduce == "softmax":
            return logits.softmax(1)
        return logits if reduce is None else logits.argmax(1).to(label_dtype(len(weight)))

    batch, _, height, width = attention.queries.shape
    row = max(1, batch * max(maps.shape[1], len(weight)) * width * maps.element_size())
    rows = max(1, _BAND_BYTES[maps.device.type] // row)
    if rows >= height or (reduce != "argmax" and writes_nothing((attention.queries, attention.keys, maps, bias))):
        return band(attention)
    begins = range(0, height, rows)
    if reduce == "argmax":
        return torch.cat([band(attention.rows(y, min(y + rows, height))) for y in begins], 1)
    result = maps.new_empty((batch, len(weight), height, width)).contiguous(memory_format=torch.channels_last)
    for y in begins:
        result[:, :, y : y + rows] = band(attention.rows(y, min(y + rows, height)))
    return result


def _head(
    attention: Attention, features: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
    """Values to attend, and what makes logits of the result, if it is not them already.

    Weights of a softmax sum to one: the bias goes with the values. With values split over N heads the head falls into
    N partial heads, K logits of each head's C / N channels, which add up: N K channels are attended instead of C. Of n
    keys a query, that is n N K products a pixel, against n C and then C K for the head on every pixel.
    """
    bias = None if bias is None else bias.to(features.dtype)
    if attention.values == "mean" or attention.num_heads == 1:
        return F.conv2d(features, weight[:, :, None, None], bias), None
    (classes, channels), heads, keys = weight.shape, attention.num_heads, attention.keys_of_a_query()
    if keys * heads * classes > channels * (keys + classes):
        return features, lambda x: F.conv2d(x, weight[:, :, None, None], bias)
    by_head = weight.unflatten(1, (heads, -1)).transpose(0, 1).flatten(0, 1)
    if bias is not None:  # once
        bias = torch.cat([bias, bias.new_zeros((heads - 1) * classes)])
    maps = F.conv2d(features, by_head[:, :, None, None], bias, groups=heads)
    return maps, lambda x: x.unflatten(1, (heads, classes)).sum(1)
