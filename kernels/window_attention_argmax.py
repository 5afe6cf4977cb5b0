"""Labels of attended logits: window attention with a running argmax over chunks of classes at its end.

A program is a tile of queries with all its heads. Logits of a chunk of classes are a product of the averaged weights
and the values, or the sum of the heads' products; they meet the classes before them in registers. The weights are
formed again for every chunk, of which there is one up to 64 classes (16 or 32 in float32, see ``attention_tile``);
averaged weights of more than 64 keys go through memory (:mod:`murf_fast.kernels.averaged_weights`).
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from murf_fast.kernels import launch, resample
from murf_fast.kernels.assembler import kernel
from murf_fast.kernels.averaged_weights import argmax_of_many_keys
from murf_fast.kernels.best_class import best_class
from murf_fast.kernels.launch import bound
from murf_fast.kernels.window_weights import (
    CELLS,
    Call,
    block_of,
    exponential_of,
    inverse_of,
    load_cells,
    members_of,
    of_head,
    partners_of,
    scores_of,
    shift_of,
    statistics_of,
    steps_of,
    terms_of,
    tile_of,
)

__all__ = ["window_attention_argmax"]


@kernel
def _window_attention_argmax(attention, class_bias, class_bias_stride, labels, tiles, y_tiles, x_tiles,
                             SPLIT: tl.constexpr, ONE_STEP: tl.constexpr, HEADS: tl.constexpr, WHOLE_D: tl.constexpr,
                             BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    heads = attention.heads
    b, i, j = tile_of(tl.program_id(0), y_tiles, x_tiles)
    mine = members_of(tiles, i, j)
    steps = 1
    if not ONE_STEP:
        steps = steps_of(tiles, i, j)
        peaks, totals = statistics_of(attention, b, mine, tiles, i, j, HEADS, WHOLE_D, BLOCK_D, PRECISION)
    best = tl.full((CELLS,), float("-inf"), dtype=tl.float32)
    index = tl.zeros((CELLS,), dtype=tl.int32)
    for first in range(0, bound(heads.width), BLOCK_C):
        logits = tl.zeros((CELLS, BLOCK_C), dtype=tl.float32)
        for step in range(bound(steps)):
            read = partners_of(tiles, i, j, step)
            term = terms_of(attention, 0, mine, read, False) if attention.terms.bias_rows is None else None
            mean = tl.zeros((CELLS, CELLS), dtype=tl.float32)
            for head in range(bound(heads.count)):
                s = scores_of(attention, b, head, mine, read, term, False, WHOLE_D, BLOCK_D, PRECISION)
                if ONE_STEP:
                    weights = exponential_of(s - shift_of(tl.max(s, axis=1))[:, None])
                    total = tl.sum(weights, axis=1)
                else:
                    weights = exponential_of(s - shift_of(of_head(peaks, head, HEADS))[:, None])
                    total = of_head(totals, head, HEADS)
                if SPLIT:
                    start = head * heads.width
                    values = load_cells(attention.v, b, read, start + first, start + heads.width, BLOCK_C)
                    weights = (weights * inverse_of(total)[:, None]).to(values.dtype)
                    logits = tl.dot(weights, values, logits, input_precision=PRECISION)
                else:
                    mean += weights * inverse_of(total * heads.count)[:, None]
            if not SPLIT:
                values = load_cells(attention.v, b, read, first, heads.width, BLOCK_C)
                logits = tl.dot(mean.to(values.dtype), values, logits, input_precision=PRECISION)
        c = first + tl.arange(0, BLOCK_C)
        if class_bias is not None:
            row = class_bias + tl.cast(b, tl.int64) * class_bias_stride
            logits += tl.load(row + c, mask=c < heads.width, other=0.0)[None, :]
        best, index = best_class(logits, c, heads.width, best, index)
    terms = attention.terms
    at = (tl.cast(b, tl.int64) * terms.height + mine.y) * terms.width + mine.x
    tl.store(labels + at, index.to(labels.dtype.element_ty), mask=mine.inside)


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
    """``labels`` (B, H, W), dense; see the op."""
    call = Call(q, k, v, bias_y, bias_x, rule, heads, mean, scale)
    if mean and not call.one_step:
        with launch.on_device_of(labels):
            argmax_of_many_keys(call, class_bias, labels)
        return
    with launch.on_device_of(labels):
        _window_attention_argmax[(call.programs,)](
            call.attention,
            class_bias,
            resample.bias_stride(class_bias),
            labels,
            call.tiles,
            *call.counts,
            SPLIT=not mean,
            ONE_STEP=call.one_step,
            HEADS=launch.power_of_two(heads),
            **_options(call, mean),
        )


def _options(call: Call, mean: bool) -> dict:
    """With the best class beside operands in registers, four warps spilled (8 to 128 bytes); but not on sm_90 where
    heads share values, in float32 with fewer channels at a time. There they take half the time of eight (H200: 0.21 for
    0.46 ms, with 16 channels of q and k at a time; 32, which do not spill in any layout, were not timed with four).
    """
    architecture, dim = launch.architecture(call.device), call.attention.heads.dim
    options, few = call.options(), mean and 90 <= architecture < 100
    options["num_warps"] = 4 if few else 8
    if launch.without_warp_groups(architecture) or call.attention.q.data.dtype == torch.float32:
        depth = block_of(dim, 32 if few else 16)
        options |= {"BLOCK_D": depth, "WHOLE_D": dim <= depth}
        if few:
            options["BLOCK_C"] = min(options["BLOCK_C"], 32)
    return options
