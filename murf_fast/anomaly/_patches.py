"""The patches of images as a detector sees them: at which size, which of them count, and their features."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast.anomaly import _images
from murf_fast.anomaly._reading import read_ahead
from murf_fast.nn import MultiResolutionEncoder

WHAT = "MultiResolutionDetector"


class HasPatches(Protocol):
    """An image of which it is known how many patches are encoded, before or after a look at its pixels."""

    @property
    def patches(self) -> int: ...


Sized = TypeVar("Sized", bound=HasPatches)


@dataclasses.dataclass(frozen=True)
class Patches:
    """The features (n, D) of the patches that count of one bank's layer and scale, the numbers (n,) int64 that they
    have in the grid (None: all), and the grid.

    ``rows`` is None where an image has no patch that counts at any scale: it is not encoded then.
    """

    rows: Tensor | None
    kept: Tensor | None
    grid: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class LookedAt:
    """An image (1, 3, H, W) at the size it is encoded in, and of every scale the numbers of the patches that count
    (None: all) and their grid.

    ``pixels`` is None where no patch counts at any scale. ``size`` is the image's own; ``mask`` (1, 1, H, W), bool, the
    foreground in it (None: all of it); ``seen`` what tells it from others, for a fit into a folder; ``ahead`` whether
    the image after it is there without waiting for it.
    """

    pixels: Tensor | None
    kept: list[Tensor | None]
    grids: list[tuple[int, int]]
    size: tuple[int, int]
    mask: Tensor | None = None
    seen: str = ""
    ahead: bool = False

    @property
    def patches(self) -> int:
        """That are encoded."""
        return 0 if self.pixels is None else sum(math.prod(grid) for grid in self.grids)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A normal image whose rows, so many per scale, are the last of the banks."""

    kept: list[Tensor | None]
    grids: list[tuple[int, int]]
    size: tuple[int, int]
    rows: list[int]

    @classmethod
    def of(cls, looked: LookedAt) -> HeldOut:
        counts = [
            math.prod(grid) if kept is None else len(kept) for kept, grid in zip(looked.kept, looked.grids, strict=True)
        ]
        return cls(looked.kept, looked.grids, looked.size, counts)


@dataclasses.dataclass(frozen=True)
class PatchEncoder:
    """Looks at images and encodes them; the attributes are those of :class:`MultiResolutionDetector`."""

    encoder: MultiResolutionEncoder
    foreground: Callable[[Tensor], Tensor] | None
    size: _images.Size
    background: str
    on_empty: str

    def grids(self, size: tuple[int, int], name: str = "an image") -> list[tuple[int, int]]:
        """Patches (rows, columns) per resolution of an image of ``size`` (height, width); a ValueError where none."""
        patch = self.encoder.family.patch_size
        try:
            scaled = self.encoder.sizes_for(*self.size.of(*size))
        except ValueError as error:
            scales = cast("list[float]", self.encoder.scales)
            small = scales.index(min(scales))
            raise ValueError(
                f"murf_fast.{WHAT}: {name} of {size[0]} x {size[1]} pixels is smaller than a patch of {patch} at "
                f"{self.resolution(small)}"
            ) from error
        return [(h // patch, w // patch) for h, w in scaled]

    def checked(
        self, images: Iterable[Any], check_rows: Callable[[Sequence[int]], None], before: Sequence[int] = ()
    ) -> Iterable[Any]:
        """``images``; what can be known of a list is checked before the first is encoded: of those in memory by their
        sizes and a sample of their pixels, of files by decoding them. ``check_rows`` is told how many rows every scale
        will have with those ``before``.
        """
        if not isinstance(images, (list, tuple)):
            return images
        sizes = [_images.size_of(image, f"`images[{i}]`") for i, image in enumerate(images)]
        sizes = _images.sizes_of_files(images, sizes)
        rows = list(before or [0] * self.scales)
        for i, (image, size) in enumerate(zip(images, sizes, strict=True)):
            _images.check_values(image, self.encoder, f"`images[{i}]`")
            for scale, (height, width) in enumerate(self.grids(size, f"`images[{i}]`")):
                rows[scale] += height * width
        if images:
            check_rows(rows)
        return images

    def encode_one(self, image: object) -> tuple[LookedAt, list[Patches]]:
        looked = self.look_at(_images.as_tensor(image), "the image")
        return looked, self.encode([looked])[0]

    def look_at_each(
        self, images: Iterable[Any], see: Callable[[Tensor, Tensor | None], str] = lambda image, mask: ""
    ) -> Iterator[LookedAt]:
        listed = isinstance(images, (list, tuple))
        for name, image, is_file in read_ahead(images):
            looked = self.look_at(image, name)
            yield dataclasses.replace(looked, seen=see(image, looked.mask), ahead=listed or is_file)

    def encode_each(
        self, images: Iterable[LookedAt], batch: int | None = None
    ) -> Iterator[tuple[LookedAt, list[Patches]]]:
        """The patches of every image per bank, in order."""
        for group in self.groups(images, batch):
            yield from zip(group, self.encode(group), strict=True)

    def groups(self, images: Iterable[Sized], batch: int | None = None) -> Iterator[list[Sized]]:
        """Neighbours that share a pass, as far as it takes them.

        Images of up to some 250 pixels gain from it; large ones go alone. An image that cannot be looked at raises when
        its turn comes: those before it, which wait for company, go without it first.
        """
        group: list[Sized] = []
        patches, error = 0, None
        most = math.inf if batch is None else batch
        images = iter(images)
        while True:
            try:
                looked = next(images)
            except StopIteration:
                break
            except Exception as found:
                error = found
                break
            if group and patches + looked.patches > self.encoder.tokens_per_pass:
                yield group
                group, patches = [], 0
            group.append(looked)
            patches += looked.patches
            # A large image does not wait while the next one is read.
            if patches >= self.encoder.tokens_per_pass or len(group) >= most:
                yield group
                group, patches = [], 0
        if group:
            yield group
        if error is not None:
            raise error

    @torch.no_grad()
    def look_at(self, image: Tensor, name: str) -> LookedAt:
        """An image as it is to be encoded."""
        size = (image.shape[2], image.shape[3])
        grids = self.grids(size, name)
        _images.check_values(image, self.encoder, name)
        image = image.to(self.device)
        mask = self._mask(image)
        kept: list[Any] = [None if mask is None else _covered(mask, grid) for grid in grids]
        if mask is not None:
            covered = [len(k) > 0 for k in kept]
            if self.on_empty == "raise" and not all(covered):
                raise ValueError(
                    f"murf_fast.{WHAT}: `foreground` covers no patch of {name} at "
                    f"{self.resolution(covered.index(False))}, where it has {grids[covered.index(False)]} patches"
                )
            if not any(covered):
                return LookedAt(None, kept, grids, size, mask)
            if self.background == "black":
                image = image * mask.to(image.dtype)
        return LookedAt(self.size.prescaled(image), kept, grids, size, mask)

    @torch.no_grad()
    def encode(self, group: Sequence[LookedAt]) -> list[list[Patches]]:
        """The patches of every image of a group per bank."""
        pixels = [looked.pixels for looked in group if looked.pixels is not None]
        if len(pixels) == 1:
            features = iter([self.encoder(pixels[0])])
        else:
            features = iter(self.encoder([image[0] for image in pixels]) if pixels else ())
        n, found = len(self.encoder.layers), []
        for looked in group:
            rows = [None] * (n * len(looked.grids))
            if looked.pixels is not None:
                rows = [m[0].flatten(1).T for m in next(features).maps]
            of_image = []
            for i, r in enumerate(rows):
                kept = looked.kept[i // n]
                of_image.append(Patches(r if r is None or kept is None else r[kept], kept, looked.grids[i // n]))
            found.append(of_image)
        return found

    def _mask(self, image: Tensor) -> Tensor | None:
        """(1, 1, H, W)"""
        if self.foreground is None:
            return None
        mask = self.foreground(image[0])
        if not isinstance(mask, Tensor):
            try:
                mask = torch.as_tensor(mask, device="cpu")
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(
                    f"murf_fast.{WHAT}: `foreground` must give a mask (H, W), a tensor or an array, got "
                    f"{type(mask).__name__}"
                ) from error
        if tuple(mask.shape) != tuple(image.shape[2:]):
            raise ValueError(
                f"murf_fast.{WHAT}: `foreground` must give a mask of the image's size, {tuple(image.shape[2:])}, got "
                f"{tuple(mask.shape)}"
            )
        return (mask != 0).to(image.device)[None, None]

    def resolution(self, i: int) -> str:
        sizes, scales = self.encoder.sizes, self.encoder.scales
        return f"scale {scales[i]}" if sizes is None and scales else f"size {cast('list[tuple[int, int]]', sizes)[i]}"

    @property
    def scales(self) -> int:
        """How many resolutions there are."""
        return len(self.encoder.sizes or self.encoder.scales or ())

    @property
    def device(self) -> torch.device:
        return next(self.encoder.model.parameters()).device


def _covered(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """(n,) int64: the patches that a mask (1, 1, H, W) covers by half or more.

    Numbers, of which the host knows how many there are: to index by a mask it would wait for whatever made the indexed.
    """
    return (F.interpolate(mask.float(), grid, mode="area").flatten() >= 0.5).nonzero().flatten()
