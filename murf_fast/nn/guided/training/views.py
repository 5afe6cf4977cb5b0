"""Random views: pad, zoom, crop, flip, rotation and perspective, the same for images and their features."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast import _arguments
from murf_fast.annotations import Size
from murf_fast.ops import _checks

_DRAWS = 7  # of a view: zoom, row, column, flip, angle, and two of perspective


@dataclass(frozen=True, eq=False)
class Views:
    """Views of images, as maps of the plane: what is sampled where does not depend on a map's resolution.

    Attributes:
        matrices: (B, count, 3, 3), from homogeneous coordinates (x, y, 1) in the view to those in the image. The area
            of the pixels, not their centres, is -1..1 along both axes.
    """

    matrices: Tensor

    def __call__(self, maps: Tensor, size: Size | None = None) -> Tensor:
        """Every view of the maps: bilinear, and mirrored at the image's edge beyond it.

        Args:
            maps: (B, C, H, W), floating point; images, or features of them at any resolution.
            size: (height, width) of a view, one integer for a square; None: that of the maps.

        Returns:
            (B count, C, *size), image by image, in the dtype of the maps. Differentiable; on a GPU the gradient is a
            sum in no fixed order, as that of ``F.grid_sample`` is.

        Raises:
            TypeError, ValueError: ``maps`` are no maps of these images, or ``size`` is none.

        Memory: the result twice; of half maps a float32 copy of both.
        """
        op, (batch, count) = "Views", self.matrices.shape[:2]
        _checks.map_(op, "maps", maps)
        if len(maps) != batch:
            raise ValueError(f"murf_fast.{op}: `maps` must be of the {batch} images of the views, got {len(maps)}")
        _checks.same_device(op, "maps", maps, "matrices", self.matrices)
        size = _checks.optional_grid(op, "size", size) or (maps.shape[2], maps.shape[3])
        # Coordinates of an image have more digits than a half type.
        wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
        seen = [_sampled(wide, self.matrices[:, i].to(wide.dtype), size) for i in range(count)]
        return torch.stack(seen, 1).flatten(0, 1).to(maps.dtype)

    def split(self) -> list[Views]:
        """One view of every image after the other."""
        return [Views(m) for m in self.matrices.split(1, 1)]


def random_views(
    images: Tensor,
    count: int = 5,
    *,
    pad: float = 20 / 224,
    zoom: float = 2.0,
    flip: float = 0.5,
    rotate: float = 0.0,
    perspective: float = 0.0,
    generator: torch.Generator | None = None,
) -> Views:
    """Random views of every image, FeatUp's jitters: the image padded by its mirror image, zoomed, and cropped.

    A view shows a share ``1 / z`` of the image's height and width, ``z`` uniform in 1..``zoom``, anywhere in the padded
    image; mirrored left to right with probability ``flip``, turned about its centre by up to ``rotate`` degrees, and
    with coordinates divided by ``1 + p x + q y``, ``p`` and ``q`` uniform in -``perspective``..``perspective``.

    Args:
        images: (B, C, H, W): how many, of which shape and where; pixels are not read.
        count: Views of every image; 5 in both papers.
        pad: To each side, as a share of it; 20 of 224 pixels in FeatUp.
        zoom: Largest, at least 1; 2 in FeatUp.
        flip: Probability.
        rotate: Degrees. FeatSharp rotates and distorts but does not say how much: 0, FeatUp's choice, is the default.
        perspective: Below a half, so that nothing is at infinity.
        generator: On the CPU; None: torch's own.

    Returns:
        :class:`Views` on the device of the images.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Memory: 9 numbers for each view.

    Source: FeatUp, section 3 (pads, zooms, crops, flips); FeatSharp, Table 11 (scale, shift, flip, rotation,
    perspective).
    """
    op = "random_views"
    _checks.map_(op, "images", images)
    count = _checks.integer(op, "count", count, 1)
    bounds = {"pad": (0, 1), "zoom": (1, math.inf), "flip": (0, 1), "rotate": (0, 180), "perspective": (0, 0.49)}
    values = {"pad": pad, "zoom": zoom, "flip": flip, "rotate": rotate, "perspective": perspective}
    for name, (least, most) in bounds.items():
        values[name] = _checks.number(op, name, values[name])
        if not least <= values[name] <= most:
            limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"murf_fast.{op}: `{name}` must be {limits}, got {values[name]}")
    _arguments.generator(op, generator)
    # Drawn on the CPU: the same views on every device.
    shape = (_DRAWS, len(images), count)
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
    height, width = images.shape[2:]
    matrices = _matrices(drawn, height / width, **values).float()
    return Views(matrices.to(images.device, non_blocking=True))


def _matrices(
    drawn: Tensor, aspect: float, *, pad: float, zoom: float, flip: float, rotate: float, perspective: float
) -> Tensor:
    """(..., 3, 3) of draws (7, ...) in 0..1; ``aspect`` is height by width."""
    of_zoom, *of_shift, of_flip, of_angle, of_p, of_q = drawn
    share = 1 / (1 + (zoom - 1) * of_zoom)
    # The crop's centre: its edges stay within the padded image, -1 - 2 pad .. 1 + 2 pad.
    y, x = ((1 + 2 * pad - share) * (2 * r - 1) for r in of_shift)
    angle = math.radians(rotate) * (2 * of_angle - 1)
    p, q = (perspective * (2 * r - 1) for r in (of_p, of_q))
    sign = 1 - 2 * (of_flip < flip).to(drawn.dtype)
    cosine, sine = share * angle.cos(), share * angle.sin()
    zero, one = torch.zeros_like(share), torch.ones_like(share)
    # An angle is one of pixels, whose sides are not 2 / H and 2 / W of each other.
    turned = _stacked([cosine, -sine * aspect, x, sine / aspect, cosine, y, zero, zero, one])
    tilted = _stacked([one, zero, zero, zero, one, zero, p, q, one])
    flipped = _stacked([sign, zero, zero, zero, one, zero, zero, zero, one])
    return turned @ tilted @ flipped


def _stacked(entries: list[Tensor]) -> Tensor:
    return torch.stack(entries, -1).unflatten(-1, (3, 3))


def _sampled(maps: Tensor, matrices: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, *size); ``matrices`` (B, 3, 3) in the dtype of the maps."""
    rows, columns = (
        torch.arange(1 - n, n, 2, dtype=maps.dtype, device=maps.device) / n for n in size
    )  # pixels' centres
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)], -1).flatten(0, 1) @ matrices.mT
    grid = (points[..., :2] / points[..., 2:]).unflatten(1, size)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
