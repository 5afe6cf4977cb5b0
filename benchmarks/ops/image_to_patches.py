"""Photos resized, normalized and cut into the rows of a product, at three sizes."""

from __future__ import annotations

import torch
from inputs import MEAN, STD, compiled, up
from registry import Contenders, Rows, case, configurations, side, smallest
from torch import Tensor

import murf_fast


@case("image_to_patches", "8 images 640 x 480, uint8 -> 266, 518, 784, patch 14")
def patches(device, dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, side(480), side(640), 3), generator=generator, dtype=torch.uint8).to(device)
    sizes, patch = [14 * side(n) for n in (19, 37, 56)], 14
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))

    def cut(x: Tensor, size: int) -> Tensor:
        n = size // patch
        rows = up(x, (size, size)).view(8, 3, n, patch, n, patch).permute(0, 2, 4, 1, 3, 5)
        return rows.reshape(8, n * n, 3 * patch * patch)

    def plain(images):
        x = ((images.permute(0, 3, 1, 2).to(dtype) / 255 - mean) / std).contiguous()
        return torch.cat([cut(x, size) for size in sizes], dim=1)

    def resize_only():
        x = ((images.permute(0, 3, 1, 2).to(dtype) / 255 - mean) / std).contiguous()
        return [up(x, (size, size)) for size in sizes][-1]

    def oracle():
        x = (images.permute(0, 3, 1, 2).double() / 255 - mean) / std
        yield (), torch.cat([cut(x, size) for size in sizes], dim=1)

    def ours():
        return Rows(murf_fast.image_to_patches(images, sizes, patch, mean=MEAN, std=STD, dtype=dtype))

    return Contenders(
        ours,
        {"eager rows": lambda: plain(images), "eager images only": resize_only, "compile": compiled(plain, images)},
        oracle,
        8 * 3 * sum(n * n for n in sizes) * dtype.itemsize,
    )


@smallest("image_to_patches")
def tiny(device: str) -> None:
    murf_fast.image_to_patches(torch.zeros(1, 3, 9, 8, dtype=torch.uint8, device=device), [(6, 7)], 3)


@configurations("image_to_patches")
def shapes(device: str, dtype: torch.dtype) -> None:
    """Photos and maps in both layouts; Pillow's filters, and one of more taps than are summed at once."""
    for images in (torch.zeros(2, 3, 20, 30, dtype=d, device=device) for d in (torch.uint8, dtype)):
        for layout in ("cyx", "yxc"):
            murf_fast.image_to_patches(images, [(28, 42)], 14, layout=layout, dtype=dtype)
    for height in (60, 600):
        images = torch.zeros(1, height, 40, 3, dtype=torch.uint8, device=device)
        murf_fast.image_to_patches(images, [16], 16, mode="bicubic", antialias=True, dtype=dtype)
    # Rows of whole vectors, as the product of patch_embed reads them.
    weight = torch.zeros(16, 3 * 14 * 14, dtype=dtype, device=device)
    murf_fast.patch_embed(torch.zeros(2, 3, 20, 30, dtype=torch.uint8, device=device), [28], weight, patch_size=14)
