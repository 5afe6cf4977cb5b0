"""Crops of an image whose features the upsampled ones of the whole image are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from murf_fast import _arguments
from murf_fast.annotations import Size
from murf_fast.ops import _checks
from murf_fast.ops.resize import resize


@dataclass(frozen=True)
class LocalCrops:
    """Images in small, and crops of them at full size, on one grid of patches.

    Attributes:
        guidance: (B, 3, h, w), the whole images: for the backbone, and for the upsampler.
        crops: (B K, 3, h, w), K of each image, image by image: for the backbone, whose features are the target.
        corners: Of every crop, its first (row, column) on the grid.
        grid: (rows, columns) of patches of an image at full size: the upsampler's ``output_size``.
        patch_size: Pixels of a patch.
    """

    guidance: Tensor
    crops: Tensor
    corners: tuple[tuple[int, int], ...]
    grid: tuple[int, int]
    patch_size: int

    def cut(self, upsampled: Tensor) -> Tensor:
        """Every crop's part of the features of the whole images.

        Args:
            upsampled: ``(B, C, *grid)``.

        Returns:
            (B K, C, h / patch_size, w / patch_size), in the order and on the grid of the backbone's maps of ``crops``.
            Differentiable.

        Raises:
            TypeError, ValueError: It is no map of these images.
        """
        op, (batch, _, height, width) = "LocalCrops.cut", self.guidance.shape
        _checks.map_(op, "upsampled", upsampled)
        if upsampled.shape[0] != batch or tuple(upsampled.shape[2:]) != self.grid:
            raise ValueError(
                f"murf_fast.{op}: `upsampled` must have batch and grid of the images, {(batch, *self.grid)}, got "
                f"{(upsampled.shape[0], *upsampled.shape[2:])}"
            )
        rows, columns, each = height // self.patch_size, width // self.patch_size, len(self.corners) // batch
        return torch.stack(
            [upsampled[i // each, :, y : y + rows, x : x + columns] for i, (y, x) in enumerate(self.corners)]
        )


def local_crops(
    images: Tensor,
    size: Size,
    patch_size: int,
    *,
    count: int = 4,
    generator: torch.Generator | None = None,
) -> LocalCrops:
    """Random crops of images, at whole patches, and the images resized to the crops' size.

    The features of a crop, of ``size`` pixels, are what the upsampled features of the resized image should be there:
    with ``grid = image size / patch_size`` as output, crop and cut have one grid. No image is ever encoded at a size
    that the backbone was not made for.

    Args:
        images: (B, 3, H, W), floating point; 448 x 448 in the paper.
        size: (height, width) of crops and resized images, one integer for a square; 224 in the paper. Sides of both are
            multiples of ``patch_size``.
        patch_size: Of the backbone.
        count: Crops of each image; 4 in the paper.
        generator: On the CPU; None: torch's own.

    Returns:
        A :class:`LocalCrops`. Images are resized bilinearly with antialiasing.

    Raises:
        TypeError, ValueError: An argument is wrong, or a crop is larger than the images; the message names it.

    Memory: the result.

    Source: AnyUp, section 4.3.1 and appendix C.
    """
    op = "local_crops"
    _checks.map_(op, "images", images)
    size = _checks.grid(op, "size", size)
    patch_size = _checks.integer(op, "patch_size", patch_size, 1)
    count = _checks.integer(op, "count", count, 1)
    _arguments.generator(op, generator)
    full = tuple(images.shape[2:])
    for name, sides in (("images", full), ("size", size)):
        if any(n % patch_size for n in sides):
            raise ValueError(
                f"murf_fast.{op}: sides of `{name}` must be multiples of `patch_size`, {patch_size}, got {sides}"
            )
    if size[0] > full[0] or size[1] > full[1]:
        raise ValueError(f"murf_fast.{op}: `size` must be within the images, {full}, got {size}")
    grid = (full[0] // patch_size, full[1] // patch_size)
    bottom, right = ((n - m) // patch_size for n, m in zip(full, size, strict=True))

    def drawn(last: int) -> int:
        return int(torch.randint(last + 1, (), generator=generator, device="cpu"))

    corners = tuple((drawn(bottom), drawn(right)) for _ in range(count * len(images)))
    crops = [
        images[i // count, :, y * patch_size : y * patch_size + size[0], x * patch_size : x * patch_size + size[1]]
        for i, (y, x) in enumerate(corners)
    ]
    stacked = torch.stack(crops) if crops else images.new_empty((0, images.shape[1], *size))
    return LocalCrops(resize(images, size, antialias=True), stacked, corners, grid, patch_size)
