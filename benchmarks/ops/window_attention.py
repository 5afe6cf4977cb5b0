"""Queries of an image, keys and values of patches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from flex_windows import split_heads
from inputs import CL, coordinates, randn
from registry import Contenders, Target, case, classes, configurations, side, smallest
from tiny import attention, backward
from torch import Tensor

import murf_fast


def windowed(device, dtype, contenders: set[str]) -> Contenders:
    """Queries of an image, keys and values of patches, AnyUp's windows; heads averaged over raw values."""
    fine, coarse, heads, depth, channels = side(448), side(32), 4, 128, 8 * classes(48)
    q = randn(device, dtype, 1, depth, fine, fine, memory_format=CL)
    k, v = (randn(device, dtype, 1, c, coarse, coarse, memory_format=CL) for c in (depth, channels))
    rule = murf_fast.windows.ratio(fine, coarse, 0.1)
    rows, columns = (torch.from_numpy(axis.multiplicity() > 0).to(device) for axis in rule.tables())
    mask = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(1, 1, fine**2, coarse**2)
    tokens = [x.flatten(2).mT.unflatten(2, (heads, -1)).transpose(1, 2).contiguous() for x in (q, k)]
    values = v.flatten(2).mT[:, None].expand(-1, heads, -1, -1).contiguous()

    def image(out: Tensor) -> Tensor:
        return out.mean(1).mT.unflatten(2, (fine, fine))

    def dense():
        return image(F.scaled_dot_product_attention(*tokens, values, attn_mask=mask))

    def flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        # Static shapes: the C++ that Inductor generates for dynamic ones does not compile (torch 2.13).
        (y_of, x_of), (key_y_of, key_x_of) = coordinates(fine, device), coordinates(coarse, device)

        def attends(b, h, q_index, k_index):
            in_rows = rows[y_of[q_index], key_y_of[k_index]]
            return in_rows & columns[x_of[q_index], key_x_of[k_index]]

        block_mask = create_block_mask(attends, None, None, fine**2, coarse**2, device=device)
        graph = torch.compile(flex_attention, dynamic=False)
        return lambda: image(graph(*tokens, values, block_mask=block_mask))

    def upsampled():
        """NATTEN's way: keys and values on the grid of the queries, gathered tap after tap."""
        n = max(axis.taps for axis in rule.tables())
        by_row, by_column = (torch.from_numpy(axis.index).long().to(device) for axis in rule.tables())
        big_k, big_v = (F.interpolate(x, (fine, fine), mode="nearest-exact") for x in (k, v))
        nearest = torch.arange(coarse, device=device) * fine // coarse + fine // coarse // 2
        split_q = q.unflatten(1, (heads, -1))
        inside = [torch.arange(n, device=device) < r.sum(1, keepdim=True) for r in (rows, columns)]
        scores = []
        for i in range(by_row.shape[1]):
            for j in range(by_column.shape[1]):
                tap = big_k[:, :, nearest[by_row[:, i]]][..., nearest[by_column[:, j]]]
                valid = inside[0][:, i, None] & inside[1][:, j]
                score = (split_q * tap.unflatten(1, (heads, -1))).sum(2) * (depth // heads) ** -0.5
                scores.append(score.masked_fill(~valid, -torch.inf))
        weights = torch.stack(scores).softmax(0).mean(2)
        total = torch.zeros_like(big_v)
        for t, weight in enumerate(weights):
            i, j = divmod(t, by_column.shape[1])
            total += weight[:, None] * big_v[:, :, nearest[by_row[:, i]]][..., nearest[by_column[:, j]]]
        return total

    def oracle():
        for y in range(0, fine, max(1, fine // 7)):
            one = murf_fast.windows.ranges(
                tuple(torch.tensor([n], dtype=torch.int32) for n in _span(rows[y])),
                tuple(torch.tensor([_span(c)[i] for c in columns], dtype=torch.int32) for i in (0, 1)),
                coarse,
            )
            exact = murf_fast.reference.window_attention(
                q[:, :, y : y + 1].double(), k.double(), v.double(), one, heads
            )
            yield (slice(None), slice(None), slice(y, y + 1)), exact

    others = {
        "dense SDPA": lambda: dense,
        "FlexAttention compile": flex,
        "upsampled keys and values": lambda: upsampled,
    }
    return Contenders(
        lambda: murf_fast.window_attention(q, k, v, windows=rule, num_heads=heads),
        {name: build() for name, build in others.items() if name in contenders},
        oracle,
        channels * fine * fine * q.element_size(),
        operations=2 * int(rows.sum() * columns.sum()) * (depth + channels),
    )


def _span(reads: Tensor) -> tuple[int, int]:
    keys = reads.nonzero()
    return int(keys.min()), int(keys.max()) + 1


@case(
    "window_attention",
    "448^2 queries, 32^2 keys, 4 heads of 32, 384 channels, AnyUp's windows",
    targets=(Target("dense", 15.0), Target("upsampled", 5.0)),
)
def window_attention(device, dtype):
    return windowed(device, dtype, {"dense SDPA", "upsampled keys and values"})


@case("window_attention", "the same against FlexAttention", targets=(Target("FlexAttention compile", 3.0),))
def window_attention_flex(device, dtype):
    return windowed(device, dtype, {"FlexAttention compile"})


@smallest("window_attention")
def tiny(device: str) -> None:
    rule = murf_fast.windows.ratio((7, 9), (3, 4), 0.3)
    attention(device, lambda q, k, v: murf_fast.window_attention(q, k, v, windows=rule, num_heads=2), (7, 9))


@configurations("window_attention")
def shapes(device: str, dtype: torch.dtype) -> None:
    """Windows of at most 64 keys and of more; averages of heads, and a share for each; with a bias and log-sum-exps."""

    def inputs(depth: int, channels: int, grid: int, keys: int) -> list[Tensor]:
        sizes = (depth, grid), (depth, keys), (channels, keys)
        maps = (torch.zeros(1, c, n, n, device=device, dtype=dtype).contiguous(memory_format=CL) for c, n in sizes)
        return [m.requires_grad_() for m in maps]

    for windows, keys in ((murf_fast.windows.ratio(42, 6, 0.1), 6), (murf_fast.windows.full(), 12)):
        for values in ("mean", "split"):
            options = {"windows": windows, "num_heads": 4, "values": values}
            backward(murf_fast.window_attention(*inputs(128, 384, 42, keys), **options))
            bias = tuple(torch.zeros(4, 42, keys, device=device, requires_grad=True) for _ in range(2))
            many = inputs(256, 128, 42, keys)
            backward(*murf_fast.window_attention(*many, bias=bias, return_lse=True, **options))
        q, k, v = inputs(128, 384, 42, keys)
        backward(murf_fast.window_attention(q.detach(), k.detach(), v, windows=windows, num_heads=4))


def split(device, dtype, fine: int, coarse: int) -> Contenders:
    """Falcon Perception's AnyUp behind its encoders: 256 channels, a share for each of four heads."""
    fine, coarse, heads, depth, channels = side(fine), side(coarse), 4, 128, 4 * classes(64)
    q = randn(device, dtype, 1, depth, fine, fine, memory_format=CL)
    k, v = (randn(device, dtype, 1, c, coarse, coarse, memory_format=CL) for c in (depth, channels))
    rule = murf_fast.windows.ratio(fine, coarse, 0.1)

    def oracle():
        for y in range(0, fine, max(1, fine // 7)):
            row, own = q[:, :, y : y + 1].double(), rule.crop(y, 0, 1, fine)
            exact = murf_fast.reference.window_attention(row, k.double(), v.double(), own, heads, "split")
            yield (slice(None), slice(None), slice(y, y + 1)), exact

    return Contenders(
        lambda: murf_fast.window_attention(q, k, v, windows=rule, num_heads=heads, values="split"),
        {"FlexAttention, analytic mask": split_heads(q, k, v, rule, heads)},
        oracle,
        channels * fine * fine * q.element_size(),
        operations=2 * math.prod(int((axis.multiplicity() > 0).sum()) for axis in rule.tables()) * (depth + channels),
    )


def _split_case(fine: int, coarse: int, dtype: torch.dtype):
    @case(
        "window_attention",
        f"{fine}^2 queries, {coarse}^2 keys, 256 channels split over 4 heads, {str(dtype).removeprefix('torch.')}",
        targets=(Target("FlexAttention", 2.0),),
        devices=("cuda",),
        dtype=dtype,
    )
    def build(device, dtype):
        return split(device, dtype, fine, coarse)


for _fine, _coarse in ((448, 28), (1024, 64)):
    for _dtype in (torch.float32, torch.bfloat16):
        _split_case(_fine, _coarse, _dtype)
