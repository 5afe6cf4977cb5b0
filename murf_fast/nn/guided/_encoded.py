"""What upsamplers make of an image alone, whatever features come to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from murf_fast import _arguments
from murf_fast.annotations import Integers
from murf_fast.nn.guided._encoders import pooled

Region = tuple[int, int, int, int]
Pair = tuple[int, int]


@dataclass(frozen=True)
class ImageKeys:
    """The image's part of the keys, as the model encodes it: averages over the features' grids.

    Attributes:
        maps: (B, D, h, w) of the grids that were named.
        whole: (B, D, H, W), of which any other grid's are averages; None: there are no others.
    """

    maps: tuple[Tensor, ...]
    whole: Tensor | None = None

    @classmethod
    def of(cls, maps: Sequence[Tensor], grids: Sequence[Pair] | None) -> ImageKeys:
        """Of maps on :func:`grids_of` these."""
        return cls((), maps[0]) if grids is None else cls(tuple(maps))

    def any(self) -> Tensor:
        """One of the maps, or the whole."""
        return self.maps[0] if self.whole is None else self.whole

    def on(self, what: str, grid: Pair) -> Tensor:
        """(B, D, *grid)."""
        for map_ in self.maps:
            if tuple(map_.shape[2:]) == tuple(grid):
                return map_
        if self.whole is None:
            known = ", ".join(str(tuple(m.shape[2:])) for m in self.maps)
            raise ValueError(
                f"murf_fast.{what}: `features` must have one of the grids that the image was encoded for, {known}, got "
                f"{tuple(grid)}"
            )
        return pooled(self.whole, grid)


def grids_of(image: Tensor, grids: Sequence[Pair] | None) -> Sequence[Pair]:
    """The grids to encode an image for: those that were named, or that of the image, for any."""
    return [(image.shape[2], image.shape[3])] if grids is None else grids


@dataclass(frozen=True)
class EncodedImage:
    """Queries of an image and what its keys need, made by ``encode_image`` and shared by any number of maps.

    Attributes:
        model: The class that encoded it.
        queries: (B, D, height, width) of the region, projected.
        keys: The image's part of the keys.
        output_size: (height, width) of the whole output.
        region: (top, left, height, width) of the queries within it.
    """

    model: str
    queries: Tensor
    keys: ImageKeys
    output_size: Pair
    region: Region

    def crop(self, region: Integers) -> EncodedImage:
        """The same, of a rectangle of the output within the region; its queries are a view.

        Raises:
            TypeError, ValueError: ``region`` is no rectangle within it.
        """
        top, left, height, width = region = check_region(self.model, region, self.output_size)
        if region == self.region:
            return self
        first_y, first_x, rows, columns = self.region
        y, x = top - first_y, left - first_x
        if min(y, x) < 0 or y + height > rows or x + width > columns:
            raise ValueError(
                f"murf_fast.{self.model}: `region` must lie within that of the encoded image, {self.region}, "
                f"got {region}"
            )
        return replace(self, queries=self.queries[:, :, y : y + height, x : x + width], region=region)


@dataclass(frozen=True)
class ImageStatistics:
    """What of an image every tile of its output needs, made once: the encoders' norms, and the keys.

    Attributes:
        model: The class that made them.
        norms: (B, n, 2, D), gains and offsets; None where images are encoded by plain PyTorch.
        keys: The image's part of the keys.
        image_size: (height, width) of the image.
        output_size: (height, width) of the output that they are for; None: of any.
    """

    model: str
    norms: Tensor | None
    keys: ImageKeys
    image_size: Pair
    output_size: Pair | None = None


def check_region(what: str, region: Any, size: Pair) -> Region:
    """(top, left, height, width) within an output of ``size``; None: all of it."""
    if region is None:
        return (0, 0, *size)
    if not _arguments.is_sequence(region) or len(region) != 4:
        found = f"a {type(region).__name__}" if isinstance(region, Tensor) else repr(region)
        raise TypeError(f"murf_fast.{what}: `region` must be (top, left, height, width), got {found}")
    top, left = (_arguments.integer(what, f"region[{i}]", region[i], 0) for i in (0, 1))
    height, width = (_arguments.integer(what, f"region[{i}]", region[i], 1) for i in (2, 3))
    if top + height > size[0] or left + width > size[1]:
        raise ValueError(
            f"murf_fast.{what}: `region` must lie within the output of {tuple(size)}, got {(top, left, height, width)}"
        )
    return top, left, height, width
