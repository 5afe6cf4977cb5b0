"""Photos to tokens at three sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from inputs import MEAN, STD, compiled, randn, up
from registry import Contenders, Target, case, classes, side, smallest
from torch import Tensor

import murf_fast


@case(
    "patch_embed",
    "8 images 640 x 480, uint8 -> 266, 518, 784, ViT-B/14 with positions",
    targets=(Target("eager", 1.3),),
    beside=("GEMM alone", "eager", 2.0),
)
def patch_embed(device, dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, side(480), side(640), 3), generator=generator, dtype=torch.uint8).to(device)
    sizes, patch, width, m = [14 * side(n) for n in (19, 37, 56)], 14, classes(768), side(37)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))
    weight = randn(device, dtype, width, 3, patch, patch) / (3 * patch * patch) ** 0.5
    bias, cls, table = (
        randn(device, dtype, width),
        randn(device, dtype, 1, width),
        randn(device, dtype, 1, 1 + m * m, width),
    )

    def embeddings(x: Tensor, weight, bias, cls, table) -> Tensor:
        tokens = F.conv2d(x, weight, bias, stride=patch)
        grid = tokens.shape[2:]
        positions = up(table[:, 1:].unflatten(1, (m, m)).permute(0, 3, 1, 2), grid, "bicubic")
        head = (cls + table[:, 0]).expand(len(x), 1, -1)
        return torch.cat([head, tokens.flatten(2).mT + positions.flatten(2).mT], dim=1).flatten(0, 1)

    def plain(images, weight, bias, cls, table):
        x = ((images.permute(0, 3, 1, 2).to(weight.dtype) / 255 - mean.to(weight)) / std.to(weight)).contiguous()
        return torch.cat([embeddings(up(x, (size, size)), weight, bias, cls, table) for size in sizes])

    arguments = (images, weight, bias, cls, table)

    def oracle():
        yield (), plain(images, *(t.double() for t in arguments[1:]))

    def ours():
        options = {"flavor": "dinov2-hf", "num_prefix_tokens": 1, "prefix": cls, "mean": MEAN, "std": STD}
        return murf_fast.patch_embed(images, sizes, weight, bias, table, patch_size=patch, **options).tokens

    tokens = sum(8 * (1 + (size // patch) ** 2) for size in sizes)
    rows = torch.cat(murf_fast.image_to_patches(images, sizes, patch, mean=MEAN, std=STD, dtype=dtype), 1).flatten(0, 1)
    product = rows.new_empty(len(rows), width)
    others = {"eager": lambda: plain(*arguments), "compile": compiled(plain, *arguments)}
    # A part of both sides, not a contender: what nobody here can make faster.
    others["GEMM alone"] = lambda: torch.mm(rows, weight.flatten(1).T, out=product)
    return Contenders(
        ours,
        others,
        oracle,
        tokens * width * weight.element_size(),
        operations=2 * tokens * width * 3 * patch * patch,
    )


@smallest("patch_embed")
def tiny(device: str) -> None:
    images = torch.zeros(1, 9, 8, 3, dtype=torch.uint8, device=device)
    weight, prefix = torch.randn(5, 27, device=device), torch.randn(2, 5, device=device)
    murf_fast.patch_embed(images, [(6, 9)], weight, patch_size=3, prefix=prefix)
