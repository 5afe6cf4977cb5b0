"""Images to the operand of a patch projection, at several resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast import backends, reference
from murf_fast.annotations import Backend, Layout, Mode, Sizes
from murf_fast.ops import _checks, _contract
from murf_fast.ops._dtypes import BY_NAME, NAMES
from murf_fast.ops._library import axes_of, register
from murf_fast.ops._resize import Resize

LAYOUTS = ("cyx", "yxc")


def image_to_patches(
    images: Tensor,
    sizes: Sizes,
    patch_size: int,
    *,
    mode: Mode = "bilinear",
    antialias: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layout: Layout = "cyx",
    dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> list[Tensor]:
    """Resize, normalize and cut a batch of images into patches, once per size, in one pass each.

    ``row[n] = flatten(patch n of (U_h image U_w^T - mean) / std)``. The resized images never exist. The normalization
    is affine and the rows of a resize sum to one, so its place before (MuRF) or after the resize does not matter.

    Args:
        images: (B, 3, H, W) or (B, H, W, 3), uint8 (scaled by 1/255) or floating point (taken as it is). Any strides.
        sizes: (height, width) in pixels, or one integer for a square, for every resolution.
        patch_size: Side p of a patch in pixels. Rows and columns beyond the last whole patch are dropped, as a
            convolution drops them.
        mode, antialias: As for :func:`upsample_concat`. MuRF's pyramid is ``"bilinear"`` without antialias;
            torchvision's and Pillow's resizes are antialiased.
        mean, std: Three numbers each, in the unit of the (scaled) pixels.
        layout: Order of the values of a row: ``"cyx"``, a convolution's flattened weight, or ``"yxc"`` (NaFlex).
        dtype: float32, bfloat16 or float16; None for the dtype of floating-point images and float32 for uint8.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None chooses from the device.

    Returns:
        For every size a tensor (B, (h // p) * (w // p), 3 * p * p); patches in raster order. No gradients.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        BackendUnavailableError: ``backend`` cannot take this call.

    Memory: the results, and a few image rows per thread.

    Source: MuRF's image pyramid and the patch embedding of every ViT; SigLIP 2's NaFlex patches.
    """
    options: dict[str, Any] = {"mode": mode, "antialias": antialias, "mean": mean, "std": std, "layout": layout}
    return padded_patches(images, sizes, patch_size, 1, dtype=dtype, backend=backend, **options)


def padded_patches(
    images: Tensor,
    sizes: Sizes,
    patch_size: int,
    multiple: int,
    *,
    mode: Mode,
    antialias: bool,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    layout: Layout,
    dtype: torch.dtype | None,
    backend: str | None,
) -> list[Tensor]:
    """:func:`image_to_patches` with zeros behind each row, up to a ``multiple`` of numbers."""
    op = "image_to_patches"
    images = _channels_second(op, images)
    if not _checks.is_sequence(sizes) or len(sizes) == 0:
        raise TypeError(f"murf_fast.{op}: `sizes` must be a non-empty list of (height, width), got {sizes!r}")
    grids = [_checks.grid(op, f"sizes[{i}]", size) for i, size in enumerate(sizes)]
    patch_size = _checks.integer(op, "patch_size", patch_size, 1)
    for i, size in enumerate(grids):
        if min(size) < patch_size:
            raise ValueError(f"murf_fast.{op}: `sizes[{i}]` must hold a patch of {patch_size} pixels, got {list(size)}")
    _checks.mode(op, mode, antialias)
    _checks.choice(op, "layout", layout, LAYOUTS)
    is_uint8 = images.dtype == torch.uint8
    gain, offset = _affine(op, mean, std, 1 / 255 if is_uint8 else 1.0)
    dtype = dtype or (torch.float32 if is_uint8 else images.dtype)
    double = dtype == torch.float64 or images.dtype == torch.float64
    if not double and dtype not in _contract.DTYPES:
        raise TypeError(f"murf_fast.{op}: `dtype` must be float32, bfloat16 or float16, got {dtype}")
    backend = _checks.backend(backend, images, torch.float64 if double else dtype)
    row_size = -(-3 * patch_size**2 // multiple) * multiple
    ways = [Resize(size, mode, antialias) for size in grids]
    options = (gain, offset, layout == "cyx", row_size, NAMES[dtype], backend)
    if backend == "reference":
        return [_reference(images, patch_size, how, *options) for how in ways]
    return [_image_to_patches(images, patch_size, how, *options) for how in ways]


def _channels_second(op: str, images: object) -> Tensor:
    if not isinstance(images, Tensor) or (images.dtype != torch.uint8 and images.dtype not in _checks.DTYPES):
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"murf_fast.{op}: `images` must be a uint8 or floating-point tensor, got {got}")
    _checks.dense(op, "images", images)
    if images.ndim != 4 or (images.shape[1] != 3 and images.shape[3] != 3) or min(images.shape[1:]) < 1:
        raise ValueError(
            f"murf_fast.{op}: `images` must be (B, 3, H, W) or (B, H, W, 3) with H, W >= 1, got {tuple(images.shape)}"
        )
    _checks.no_gradients(op, "`images`", [images], forward_mode=True)
    return images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)


def _affine(op: str, mean, std, scale: float) -> tuple[list[float], list[float]]:
    """Per channel (gain, offset) such that the normalized value is ``pixel * gain + offset``."""
    numbers = []
    for name, value, default in (("mean", mean, 0.0), ("std", std, 1.0)):
        value = value.tolist() if isinstance(value, Tensor) else value
        value = [default] * 3 if value is None else _checks.numbers(op, name, value, 3)
        if name == "std" and not all(v > 0 for v in value):
            raise ValueError(f"murf_fast.{op}: `{name}` must be three numbers, all > 0, got {value}")
        numbers.append(value)
    means, stds = numbers
    return [scale / s for s in stds], [-m / s for m, s in zip(means, stds, strict=True)]


def _requires(op, images, patch_size, how, gain, offset, channels_first, row_size, dtype, backend) -> None:
    _contract.tensor(op, "images", images, images, (None, 3, None, None), (torch.uint8, *_contract.DTYPES))
    _contract.grid(op, "images' size", images.shape[2:])
    _contract.backend(op, backend, images)
    _contract.resize(op, how)
    if not 1 <= patch_size <= min(how.size):
        raise ValueError(f"murf_fast.{op}: `patch_size` must be in 1 .. {min(how.size)}, got {patch_size}")
    if row_size < 3 * patch_size**2:
        raise ValueError(f"murf_fast.{op}: `row_size` must be at least {3 * patch_size**2}, got {row_size}")
    _contract.count(op, "gain", gain, 3)
    _contract.count(op, "offset", offset, 3)
    _contract.one_of(op, "dtype", dtype, [NAMES[known] for known in _contract.DTYPES])


def _empty(images, patch_size, how, gain, offset, channels_first, row_size, dtype, backend) -> Tensor:
    patches = (how.size[0] // patch_size) * (how.size[1] // patch_size)
    return images.new_empty((images.shape[0], patches, row_size), dtype=BY_NAME[dtype])


def _launch(images, patch_size, how, gain, offset, channels_first, row_size, dtype, backend, out) -> None:
    backends.launcher(backend).image_to_patches(
        images, axes_of(*images.shape[2:], *how), patch_size, tuple(gain), tuple(offset), channels_first, out
    )


def _reference(images, patch_size, how, gain, offset, channels_first, row_size, dtype, backend) -> Tensor:
    # Arithmetic in the dtype of the result, but never below float32, as for every other backend.
    dtype = BY_NAME[dtype]
    pixels, layout = images.to(torch.promote_types(dtype, torch.float32)), LAYOUTS[0] if channels_first else LAYOUTS[1]
    rows = reference.image_to_patches(pixels, how.size, patch_size, gain, offset, how.mode, how.antialias, layout)
    return F.pad(rows.to(dtype), (0, row_size - rows.shape[2])) if row_size > rows.shape[2] else rows.to(dtype)


def _forward_mode(args, tangents) -> Tensor:
    """The op on the tangent, without the offset."""
    return torch.ops.murf_fast.image_to_patches(tangents[0], *args[1:6], [0.0] * 3, *args[7:])


_image_to_patches = register(
    "image_to_patches(Tensor images, SymInt[] size, int patch_size, str interpolation, bool antialias, float[] gain, "
    "float[] offset, bool channels_first, int row_size, str dtype, str backend) -> Tensor",
    _requires,
    _empty,
    _launch,
    forward_mode=_forward_mode,
    reference=_reference,
    onnx=True,
    checked=True,
)
