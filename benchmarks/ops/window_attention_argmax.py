"""Labels of a head behind an upsampler: queries of an image, logits of patches."""

from __future__ import annotations

import torch
from inputs import CL, randn
from registry import Contenders, Target, case, classes, configurations, side, smallest
from tiny import PLANAR

import murf_fast


@case(
    "window_attention_argmax",
    "448^2 queries, 32^2 keys, 4 heads of 32, 21 classes, AnyUp's windows",
    # Labels instead of logits; and the head before instead of behind the attention of 384 channels.
    targets=(Target("attention of logits", 1.0), Target("attention of channels", 3.0)),
    memory_target=(0.05, "channels"),
)
def labels(device, dtype):
    fine, coarse, heads, depth, channels = side(448), side(32), 4, 128, 8 * classes(48)
    q = randn(device, dtype, 1, depth, fine, fine, memory_format=CL)
    k, v = (randn(device, dtype, 1, c, coarse, coarse, memory_format=CL) for c in (depth, channels))
    weight = randn(device, dtype, classes(21), channels, 1, 1) * channels**-0.5
    low = torch.nn.functional.conv2d(v, weight)
    options = {"windows": murf_fast.windows.ratio(fine, coarse, 0.1), "num_heads": heads}

    def of_logits():
        return murf_fast.window_attention(q, k, low, **options).argmax(1)

    def of_channels():
        return torch.nn.functional.conv2d(murf_fast.window_attention(q, k, v, **options), weight).argmax(1)

    def logits(dtype):
        return murf_fast.reference.window_attention_argmax(
            *(x.to(dtype) for x in (q, k, low)), options["windows"], heads
        )[1]

    def oracle():
        yield (), logits(torch.float64)

    return Contenders(
        lambda: murf_fast.window_attention_argmax(q, k, low, **options),
        {"attention of logits": of_logits, "attention of channels": of_channels},
        oracle,
        channels * fine * fine * q.element_size(),
        logits=lambda: logits(dtype),
    )


@smallest("window_attention_argmax")
def tiny(device: str) -> None:
    q, k, v = (torch.randn(1, 20, *grid, device=device) for grid in ((7, 9), (3, 4), (3, 4)))
    murf_fast.window_attention_argmax(q, k, v, windows=murf_fast.windows.ratio((7, 9), (3, 4), 0.3), num_heads=2)


@configurations("window_attention_argmax")
def shapes(device: str, dtype: torch.dtype) -> None:
    """Windows of at most 64 keys and of more; one chunk of classes and several; averages of heads, and sums."""
    for windows, keys in ((murf_fast.windows.ratio(42, 6, 0.1), 6), (murf_fast.windows.full(), 12)):
        for values, classes_of, layout in (("mean", 21, CL), ("split", 21, CL), ("mean", 150, PLANAR)):
            sizes = (128, 42), (128, keys), (classes_of * (4 if values == "split" else 1), keys)
            q, k, v = (
                torch.zeros(1, c, n, n, device=device, dtype=dtype).contiguous(memory_format=layout) for c, n in sizes
            )
            options = {"windows": windows, "num_heads": 4, "values": values}
            murf_fast.window_attention_argmax(q, k, v, **options)
            bias = tuple(torch.zeros(4, 42, keys, device=device) for _ in range(2))
            class_bias = torch.zeros(classes_of, device=device)
            murf_fast.window_attention_argmax(q, k, v, **options, bias=bias, class_bias=class_bias)
