"""SigLIP-HD: multi-scale averages as targets of a student that sees one scale, and the choices of its tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from murf_fast.annotations import Mode, Size, TileFusion, Tiling
from murf_fast.nn._options import LayerOptions
from murf_fast.nn.vit import _images, _windows
from murf_fast.nn.vit.multi_resolution_encoder import MultiResolutionEncoder, encoder_of
from murf_fast.ops import _checks
from murf_fast.ops.upsample_concat import upsample_concat
from murf_fast.ops.upsample_mean import upsample_mean

if TYPE_CHECKING:
    from typing_extensions import Unpack

TILINGS = ("disjoint", "half_overlap", "whole")
FUSIONS = ("average", "concat", "unshuffle")
LOSSES = ("l1", "cosine", "smooth_l1", "cosine_smooth_l1")
_COSINE, _SMOOTH = 0.9, 0.1  # AM-RADIO's shares


def multi_scale_target(
    model: nn.Module,
    images: Tensor,
    factors: Sequence[int] = (1, 2),
    *,
    size: Size | None = None,
    weights: Sequence[float] | None = None,
    tiling: Tiling = "disjoint",
    fusion: TileFusion = "average",
    grid: Size | None = None,
    mode: Mode = "bilinear",
    antialias: bool = True,
    **options: Unpack[LayerOptions],
) -> Tensor:
    """The teacher's map: base scale and finer scales in tiles of the base's size, averaged on the base grid.

    ``F_t = sum_f w_f U_f tiles_f(resize(image, f * size)) / sum_f w_f``. Every tile has the base's size, so base and
    tiles are one batch. ``U_f`` is bilinear: the mean of 2 x 2 cells for a factor of 2, the middle cell for 3.

    Args:
        model: The frozen teacher, one that :class:`MultiResolutionEncoder` takes.
        images: (B, 3, H, W) or (B, H, W, 3), uint8 or floating point, best at the finest scale.
        factors: Scales as multiples of ``size``; the paper compares (1, 2), (1, 2, 3), (1, 2, 3, 4), and single ones.
        size: (height, width) of the base scale in pixels, one integer for a square; None for the images' size divided
            by the largest factor.
        weights: w_f, one number for every factor (Table 10); None weighs all alike. For ``fusion="average"``.
        tiling: How factor f is encoded (Table 3). ``"disjoint"``: f x f tiles. ``"half_overlap"``: (2 f - 1)^2 tiles at
            half their size from each other, averaged where they overlap. ``"whole"``: one sequence, with the table of
            positions resized to it.
        fusion: How scales are put together (Table 4). ``"average"``; ``"concat"``: channels of every scale behind each
            other, after ``U_f``; ``"unshuffle"``: likewise, with ``F.pixel_unshuffle`` in place of ``U_f``: the
            channels of f x f cells.
        grid: (rows, columns) of the target, one integer for a square; None for the base's. CLIP-HD's teacher has a base
            of 336 pixels, 24 x 24 patches, and its student 518, so that the target's grid is 37.
        mode, antialias: How images are resized.
        options: The other options of the encoder (layers, norm, mean, std, attention); one layer.

    Returns:
        (B, D, h, w), channels_last by strides, without gradients; with ``"concat"`` as many times D channels as there
        are factors, with ``"unshuffle"`` as the sum of their squares (on the base's grid).

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: as the encoder, and one copy of each tiled map; with overlap also the resized images and their tiles, in
    float32, and one map more.

    Source: SigLIP-HD, sections 2, 3 and 4.3, Tables 2, 3, 4, 9, 10 and 11.
    """
    op = "multi_scale_target"
    if not _checks.is_sequence(factors) or len(factors) == 0:
        raise ValueError(f"murf_fast.{op}: `factors` must be positive integers, got {factors!r}")
    factors = [_checks.integer(op, "factors", factor, 1) for factor in factors]
    layers = options.get("layers")
    if layers is not None and _checks.is_sequence(layers) and len(layers) != 1:
        raise ValueError(f"murf_fast.{op}: `layers` must be one layer, got {options['layers']!r}")
    _checks.choice(op, "tiling", tiling, TILINGS)
    _checks.choice(op, "fusion", fusion, FUSIONS)
    weights = _checked_weights(op, weights, factors, fusion)
    base = _base(op, images, factors, size)
    grid = _checks.optional_grid(op, "grid", grid)
    sizes = [base] if tiling == "half_overlap" else [(f * base[0], f * base[1]) for f in factors]
    tiles = factors if tiling == "disjoint" else None
    encoder = encoder_of(model, sizes, tiles=tiles, mode=mode, antialias=antialias, **options)
    of_base = tuple(n // encoder.family.patch_size for n in base)
    grid = grid or of_base
    if fusion == "unshuffle" and any(f * n % m for f in factors for n, m in zip(of_base, grid, strict=True)):
        raise ValueError(
            f"murf_fast.{op}: `grid` must divide that of every scale, {of_base} times {factors}, for "
            f'fusion="unshuffle", got {grid}'
        )
    with torch.no_grad():
        maps = _overlapping(op, encoder, images, factors, of_base) if tiling == TILINGS[1] else encoder(images).maps
        if fusion == "average":
            return upsample_mean(maps, grid, weights, memory_format=torch.channels_last)
        if fusion == "concat":
            return upsample_concat(maps, grid, memory_format=torch.channels_last)
        return _unshuffled(maps, grid)


def _base(op: str, images: object, factors: Sequence[int], size: object) -> tuple[int, int]:
    """(height, width) of the base scale in pixels."""
    height, width = _images.size_of(op, images)
    if size is None:
        if height % max(factors) or width % max(factors):
            raise ValueError(
                f"murf_fast.{op}: `size` is needed for images of {(height, width)}, no multiple of the largest factor, "
                f"{max(factors)}"
            )
        size = (height // max(factors), width // max(factors))
    return _checks.grid(op, "size", size)


def _checked_weights(op: str, weights: object, factors: Sequence[int], fusion: str) -> list[float] | None:
    if weights is None:
        return None
    if fusion != "average":
        raise ValueError(f'murf_fast.{op}: `weights` are for fusion="average", got {fusion!r}')
    weights = _checks.numbers(op, "weights", weights, len(factors))
    if min(weights) < 0 or sum(weights) == 0:
        raise ValueError(f"murf_fast.{op}: `weights` must be at least 0, and one of them above, got {weights}")
    return weights


def _overlapping(
    op: str, encoder: MultiResolutionEncoder, images: Tensor, factors: Sequence[int], grid: tuple[int, ...]
) -> list[Tensor]:
    """The map of every factor, of windows that overlap by half; all windows are one batch of the encoder."""
    size = cast("list[tuple[int, int]]", encoder.sizes)[0]
    if grid[0] % 2 or grid[1] % 2:
        patch = encoder.family.patch_size
        raise ValueError(
            f'murf_fast.{op}: `size` must be an even number of patches of {patch} pixels for tiling="half_overlap", '
            f"got {size}"
        )
    _checks.same_device(op, "images", images, "model", encoder.family.like)
    how = encoder.resize
    _images.check_values(op, images, encoder.model, how["mean"], how["std"])
    pixels = _images.as_floats(images)
    cut = [_windows.cut(pixels, f, size, how["mode"], how["antialias"]) for f in factors]
    (encoded,) = encoder(torch.cat(cut)).maps
    parts = encoded.split([len(windows) for windows in cut])
    return [_windows.merged(part, f, len(images)) for part, f in zip(parts, factors, strict=True)]


def _unshuffled(maps: Sequence[Tensor], grid: tuple[int, ...]) -> Tensor:
    """Channels (c, row, column) of the cells of a map that lie in one of the grid, map after map."""
    batch = len(maps[0])
    cells = [m.unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1)) for m in maps]
    channels = [c.shape[1] * c.shape[3] * c.shape[5] for c in cells]
    result = maps[0].new_empty((batch, sum(channels), *grid)).contiguous(memory_format=torch.channels_last)
    for part, c in zip(result.split(channels, 1), cells, strict=True):
        part.unflatten(1, (c.shape[1], c.shape[3], c.shape[5])).copy_(c.permute(0, 1, 3, 5, 2, 4))
    return result


def fine_to_coarse_loss(
    features: Tensor, target: Tensor, kind: Literal["l1", "cosine", "smooth_l1", "cosine_smooth_l1"] = "l1"
) -> Tensor:
    """The student's map at the base scale against :func:`multi_scale_target`, position by position.

    ``"l1"``: ``mean |F_s - F_t|``, the paper's choice. ``"cosine"``: ``mean (1 - cos(F_s, F_t))`` over positions
    (EVA). ``"smooth_l1"``: ``mean h(F_s - F_t)``, ``h(x) = x^2 / 2`` up to 1 and ``|x| - 1/2`` beyond.
    ``"cosine_smooth_l1"``: 0.9 times the former and 0.1 times the latter (AM-RADIO).

    Args:
        features: (B, D, h, w), the student's, floating point.
        target: (B, D, h, w) in any floating dtype, which is converted to that of the features; no gradients go to it.
        kind: One of the four.

    Returns:
        A scalar in the dtype of the features; cosines are computed in float32 at least.

    Raises:
        TypeError, ValueError: An argument is no map, the shapes differ, or there is no such kind.

    Memory: two maps of differences, a copy of a target of another dtype; in the backward four maps, the gradient among
    them; with cosines six, in float32, and of half features a float32 copy.

    Source: SigLIP-HD, section 3 and Table 8.
    """
    op = "fine_to_coarse_loss"
    _checks.map_(op, "features", features)
    _checks.map_(op, "target", target)
    _checks.choice(op, "kind", kind, LOSSES)
    if features.shape != target.shape:
        raise ValueError(
            f"murf_fast.{op}: `target` must have the shape of `features`, {tuple(features.shape)}, "
            f"got {tuple(target.shape)}"
        )
    target = target.detach().to(features.dtype)
    if kind == "l1":
        return F.l1_loss(features, target)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(features, target)
    wide = torch.promote_types(features.dtype, torch.float32)
    cosine = (1 - F.cosine_similarity(features.to(wide), target.to(wide), dim=1)).mean()
    if kind == "cosine_smooth_l1":
        cosine = _COSINE * cosine + _SMOOTH * F.smooth_l1_loss(features, target).to(wide)
    return cosine.to(features.dtype)
