"""A running argmax over chunks of classes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def best_class(logits, c, classes, best, index):
    """``best`` and ``index`` of every row, with classes ``c`` of its ``logits`` (rows, chunk) considered.

    As torch: the lowest class among equals, and the first NaN beats everything. Chunks come in the order of classes.
    """
    logits = tl.where((c < classes)[None, :], logits, float("-inf"))
    is_nan = logits != logits
    has_nan = tl.max(is_nan.to(tl.int32), axis=1) > 0
    largest = tl.max(tl.where(is_nan, float("-inf"), logits), axis=1)
    winners = tl.where(has_nan[:, None], is_nan, logits == largest[:, None])
    winner = tl.min(tl.where(winners, c[None, :], classes), axis=1)
    wins = (best == best) & (has_nan | (largest > best))
    best = tl.where(wins, tl.where(has_nan, float("nan"), largest), best)
    return best, tl.where(wins, winner, index)
