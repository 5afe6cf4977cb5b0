"""Images as users have them - a batch, a list of any sizes, a padded batch, what a processor returns - as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from torch import Tensor

from murf_fast.annotations import Sizes
from murf_fast.nn.vit import _images
from murf_fast.nn.vit.families._family import Family
from murf_fast.ops import _checks

Images = Tensor | Sequence[Tensor] | Mapping[str, object]
ImageSizes = Sizes | Tensor  # (height, width) of every image; arrays and tensors (B, 2)

# What processors of transformers return beside the pixels: masks of padded batches and of lists of patches.
_PADDED, _PATCHES = ("pixel_mask",), ("pixel_attention_mask", "spatial_shapes")
KEYS = ("pixel_values", *_PADDED, *_PATCHES)


def images_of(what: str, images: Images, image_sizes: object, family: Family) -> Tensor | list[Tensor]:
    """A batch as it is, or everything else as a list of views (1, 3, H, W) and (1, H, W, 3) of single images.

    Raises:
        TypeError, ValueError: These are no images; the message names the argument, the key or the entry.
    """
    if isinstance(images, Mapping):
        return _of_processor(what, images, image_sizes, family)
    if isinstance(images, (list, tuple)):
        if image_sizes is not None:
            raise ValueError(f"murf_fast.{what}: `image_sizes` are for a padded batch, `images` is a list")
        return _listed(what, images)
    if image_sizes is None and isinstance(images, Tensor):
        return images
    _images.size_of(what, images)
    return _cropped(what, cast("Tensor", images), _sizes(what, "image_sizes", image_sizes, len(images)))


def _of_processor(what: str, given: Mapping[str, Any], image_sizes: object, family: Family) -> Tensor | list[Tensor]:
    unknown = [key for key in given if key not in KEYS]
    if unknown or "pixel_values" not in given:
        lacks = f"has {unknown}" if unknown else "has no `pixel_values`"
        raise ValueError(f"murf_fast.{what}: `images` as a dict must hold `pixel_values` and of {KEYS[1:]}, it {lacks}")
    pixels = given["pixel_values"]
    if any(key in given for key in _PATCHES):
        if "pixel_mask" in given or image_sizes is not None:
            raise ValueError(f"murf_fast.{what}: `images` are lists of patches, which have `spatial_shapes` alone")
        return _of_patches(what, pixels, given.get("spatial_shapes"), given.get("pixel_attention_mask"), family)
    if isinstance(pixels, Tensor) and pixels.ndim == 3 and "pixel_mask" not in given:
        raise ValueError(
            f"murf_fast.{what}: `pixel_values` must be images (B, 3, H, W) or, with `spatial_shapes`, patches, got "
            f"{tuple(pixels.shape)}"
        )
    if "pixel_mask" not in given:
        return images_of(what, pixels, image_sizes, family)
    if image_sizes is not None:
        raise ValueError(f"murf_fast.{what}: give either `image_sizes` or a `pixel_mask`")
    height, width = _images.size_of(what, pixels)
    mask = _mask(what, "pixel_mask", given["pixel_mask"], (len(pixels), height, width))
    rows, columns = mask.any(2).sum(1).tolist(), mask.any(1).sum(1).tolist()
    for i, (h, w) in enumerate(zip(rows, columns, strict=True)):
        if not mask[i, :h, :w].all() or int(mask[i].sum()) != h * w:
            raise ValueError(f"murf_fast.{what}: `pixel_mask[{i}]` must be ones in the top left corner and zeros else")
    return _cropped(what, pixels, _sizes(what, "pixel_mask", list(zip(rows, columns, strict=True)), len(pixels)))


def _of_patches(what: str, patches: object, shapes: object, mask: object, family: Family) -> list[Tensor]:
    """The images that NaFlex cut into patches (B, N, p p 3), of which the first rows * columns of an image count."""
    p = family.patch_size
    if family.layout != "yxc":
        raise ValueError(
            f"murf_fast.{what}: `pixel_values` with `spatial_shapes` are lists of patches, for models whose embedding "
            f"takes those (Siglip2VisionModel), `model` is {type(family.model).__name__}"
        )
    if not isinstance(patches, Tensor) or not patches.is_floating_point():
        got = patches.dtype if isinstance(patches, Tensor) else type(patches).__name__
        raise TypeError(f"murf_fast.{what}: `pixel_values` must be a floating-point tensor of patches, got {got}")
    if patches.ndim != 3 or patches.shape[2] != 3 * p * p:
        raise ValueError(
            f"murf_fast.{what}: `pixel_values` must be patches (B, N, {3 * p * p}), got {tuple(patches.shape)}"
        )
    if shapes is None:
        raise ValueError(f"murf_fast.{what}: lists of patches need `spatial_shapes`, (rows, columns) of every image")
    batch, most, _ = patches.shape
    if batch == 0:
        raise ValueError(f"murf_fast.{what}: `pixel_values` must hold the patches of at least one image, got none")
    grids = _sizes(what, "spatial_shapes", shapes, batch)
    kept = None if mask is None else _mask(what, "pixel_attention_mask", mask, (batch, most))
    images = []
    for i, (rows, columns) in enumerate(grids):
        count = rows * columns
        if count > most:
            raise ValueError(
                f"murf_fast.{what}: `spatial_shapes[{i}]` must be of at most {most} patches, got {(rows, columns)}"
            )
        if kept is not None and (not kept[i, :count].all() or kept[i, count:].any()):
            raise ValueError(
                f"murf_fast.{what}: `pixel_attention_mask[{i}]` must be ones for the {count} patches of "
                f"`spatial_shapes[{i}]`, {(rows, columns)}, and zeros behind them"
            )
        images.append(family.pixels(patches[i : i + 1, :count], (rows, columns)))
    return images


def _listed(what: str, images: Sequence[Tensor]) -> list[Tensor]:
    if len(images) == 0:
        raise ValueError(f"murf_fast.{what}: `images` must hold at least one image, got an empty list")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(f"murf_fast.{what}: `images[{i}]` must be a tensor, got {type(image).__name__}")
        if image.ndim != 3:
            raise ValueError(
                f"murf_fast.{what}: `images[{i}]` must be (3, H, W) or (H, W, 3) with H, W >= 1, got "
                f"{tuple(image.shape)}"
            )
        _images.size_of(what, image[None], f"`images[{i}]`")
    return [image[None] for image in images]


def _cropped(what: str, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The top left corners of a padded batch, views."""
    padded = _images.size_of(what, images)
    if len(images) == 0:
        raise ValueError(f"murf_fast.{what}: `images` must hold at least one image, got an empty batch with sizes")
    # Channels first, as a crop of three rows does not tell.
    images = images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
    crops = []
    for i, (height, width) in enumerate(sizes):
        if height > padded[0] or width > padded[1]:
            raise ValueError(
                f"murf_fast.{what}: `image_sizes[{i}]` must lie within the padded images of {padded[0]} x {padded[1]} "
                f"pixels, got {(height, width)}"
            )
        crops.append(images[i : i + 1, :, :height, :width])
    return crops


def _sizes(what: str, name: str, sizes: object, count: int) -> list[tuple[int, int]]:
    """One pair of positive integers for each of ``count`` images, of a list, array or tensor."""
    if isinstance(sizes, (Tensor, np.ndarray)):
        sizes = sizes.tolist()
    if not isinstance(sizes, Sequence) or isinstance(sizes, (str, bytes)):
        raise TypeError(f"murf_fast.{what}: `{name}` must be a list of (height, width), got {type(sizes).__name__}")
    if len(sizes) != count:
        raise ValueError(f"murf_fast.{what}: `{name}` must hold one entry for each of {count} images, got {len(sizes)}")
    return [
        _checks.grid(what, f"{name}[{i}]", tuple(size) if isinstance(size, Tensor) else size)
        for i, size in enumerate(sizes)
    ]


def _mask(what: str, name: str, mask: object, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"murf_fast.{what}: `{name}` must be a tensor, got {type(mask).__name__}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"murf_fast.{what}: `{name}` must have shape {shape}, got {tuple(mask.shape)}")
    return mask.to("cpu") != 0
