from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast.reference._encoders import guided_encoder
from murf_fast.reference._resize import averaged
from murf_fast.windows import Windows


def naf(
    weights: Mapping[str, Tensor],
    image: Tensor,
    features: Tensor,
    windows: Windows,
    output_size: Sequence[int] | None = None,
    num_heads: int = 4,
) -> Tensor:
    """NAF as whole maps and a dense mask; (B, C, H, W). ``windows`` is the rule for output and features."""
    size = tuple(output_size or image.shape[2:])
    q, k = naf_queries_and_keys(weights, image, size, features.shape[2:], num_heads)
    rows, columns = (torch.from_numpy(t.multiplicity()).to(q).log() for t in windows.tables(size, features.shape[2:]))
    mask = (rows[:, None, :, None] + columns[None, :, None, :]).flatten(0, 1).flatten(1)
    q, k, v = (x.unflatten(1, (num_heads, -1)).flatten(3).mT for x in (q, k, features))
    attention = (q @ k.mT * q.shape[3] ** -0.5 + mask).softmax(-1)
    return (attention @ v).mT.flatten(1, 2).unflatten(2, size)


def naf_queries_and_keys(
    weights: Mapping[str, Tensor], image: Tensor, size: Sequence[int], grid: Sequence[int], num_heads: int
) -> tuple[Tensor, Tensor]:
    """Maps (B, D, *size) and (B, D, *grid)."""
    if image.shape[2] > 4 * size[0] or image.shape[3] > 4 * size[1]:
        image = F.interpolate(image, [min(n, 4 * min(size)) for n in image.shape[2:]], mode="bilinear")
    names = ("image_encoder.encoder", "image_encoder.sem_encoder")
    encoded = torch.cat([guided_encoder(weights, name, image, residual=False) for name in names], 1)
    q = turned(averaged(encoded, size), weights["image_encoder.rope.periods"], num_heads)
    return q, averaged(q, grid)


def turned(x: Tensor, periods: Tensor, num_heads: int) -> Tensor:
    """DINOv3's rotary embedding: of every head's pairs of channels half turn with the row, half with the column."""
    (height, width), periods = x.shape[2:], periods.to(x.dtype)
    rows, columns = ((torch.arange(0.5, n, dtype=x.dtype, device=x.device) / n * 2 - 1) for n in (height, width))
    rows = (2 * math.pi * rows / periods[:, None])[:, :, None].expand(-1, -1, width)
    columns = (2 * math.pi * columns / periods[:, None])[:, None].expand(-1, height, -1)
    angle = torch.cat([rows, columns])
    first, second = x.unflatten(1, (num_heads, 2, -1)).unbind(2)
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack([first * cosine - second * sine, second * cosine + first * sine], 2).flatten(1, 3)
