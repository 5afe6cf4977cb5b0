"""Attention to windows by FlexAttention as Falcon Perception's AnyUp does it: the block mask follows from geometry."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from murf_fast.windows import Windows

BLOCK = 128


def block_mask(rule: Windows, device: torch.device | str, block: int = BLOCK) -> BlockMask:
    """Blocks of queries, row after row, against the run of key blocks from the first to the last key that one of them
    sees. Windows are (start, end) ranges that move forward, so a block's are known from its first and last query.

    torch's ``create_block_mask`` evaluates the rule for every pair instead: 200 million at 448^2 from 32^2.
    """
    (y0, y1), (x0, x1) = bounds = [_bounds(axis) for axis in rule.tables()]
    (height, width), (rows, columns) = rule.out, rule.grid
    first = np.arange(0, height * width, block)
    last = np.minimum(first + block, height * width) - 1
    top, bottom = first // width, last // width
    # A block that goes over the end of a row has queries of both borders.
    several = top < bottom
    left, right = np.where(several, 0, first % width), np.where(several, width - 1, last % width)
    begin = (y0[top] * columns + x0[left]) // block
    end = ((y1[bottom] - 1) * columns + x1[right] - 1) // block + 1
    key_blocks = -(-rows * columns // block)
    index = np.minimum(begin[:, None] + np.arange(key_blocks), key_blocks - 1)
    counts, index = (torch.from_numpy(x.astype(np.int32)).to(device) for x in (end - begin, index))
    (y0, y1), (x0, x1) = ([torch.from_numpy(x).to(device) for x in pair] for pair in bounds)

    def attends(b, h, query, key):
        y, x, key_y, key_x = query // width, query % width, key // columns, key % columns
        return (key_y >= y0[y]) & (key_y < y1[y]) & (key_x >= x0[x]) & (key_x < x1[x])

    return BlockMask.from_kv_blocks(
        counts[None, None],
        index[None, None],
        BLOCK_SIZE=(block, block),
        mask_mod=attends,
        seq_lengths=(height * width, rows * columns),
    )


def _bounds(axis) -> tuple[np.ndarray, np.ndarray]:
    """First key of every window, and the end."""
    seen = axis.multiplicity() > 0
    return seen.argmax(1), seen.shape[1] - seen[:, ::-1].argmax(1)


def split_heads(q: Tensor, k: Tensor, v: Tensor, rule: Windows, heads: int) -> Callable[[], Tensor]:
    """Attention of maps (B, C, H, W) to (B, C, h, w), each head with its share of the values; compiled on CUDA.

    Queries, keys and values are tokens of heads before the clock runs; the result is a map, as its user needs it.
    """
    mask, size = block_mask(rule, q.device), q.shape[2:]
    tokens = [x.flatten(2).unflatten(1, (heads, -1)).mT.contiguous() for x in (q, k, v)]
    # Static shapes, which are the faster; without CUDA there is nothing to time, and the rule itself is run.
    attention = torch.compile(flex_attention, dynamic=False) if q.is_cuda else flex_attention
    return lambda: attention(*tokens, block_mask=mask).transpose(1, 2).flatten(2).mT.unflatten(2, size)
