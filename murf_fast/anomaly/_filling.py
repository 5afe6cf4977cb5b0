"""The images of a fit, encoded and told apart, and how they fill banks: by this process or by others."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from murf_fast.anomaly._growing import GrowingBanks
from murf_fast.anomaly._patches import WHAT, HeldOut, PatchEncoder


@dataclass(frozen=True)
class Filled:
    """What a fit keeps of an image: its patches' numbers, what tells it from others, and its rows per bank (None: it
    has none there; no entry where it was only looked at)."""

    held: HeldOut
    digest: str
    rows: list[Tensor | None]


class Filling(Protocol):
    """The images of a fit, in their order, each given out once."""

    def seen(self, count: int) -> Iterator[Filled]:
        """The first ``count``, or fewer if there are no more: read, not encoded."""
        ...

    def encoded(self) -> Iterator[Filled]:
        """All others."""
        ...


class OneProcess:
    """Images that this process encodes.

    Args:
        patches: Encodes them.
        images: As for ``fit``.
        batch: So many at most share a pass.
        tells: Whether images are told apart; else their digests are empty.
    """

    def __init__(self, patches: PatchEncoder, images: Iterable[Any], batch: int | None, tells: bool) -> None:
        self._patches, self._batch = patches, batch
        self._looked_at = patches.look_at_each(images, *([digest_of] if tells else []))

    def seen(self, count: int) -> Iterator[Filled]:
        for looked in itertools.islice(self._looked_at, count):
            yield Filled(HeldOut.of(looked), looked.seen, [])

    def encoded(self) -> Iterator[Filled]:
        for looked, of_image in self._patches.encode_each(self._looked_at, self._batch):
            yield Filled(HeldOut.of(looked), looked.seen, [patches.rows for patches in of_image])


def fill(
    growing: GrowingBanks,
    filling: Filling,
    total: int | None,
    held_out: int,
    progress: Callable[[int, int | None], None] | None,
) -> list[HeldOut]:
    """Writes the rows of all images. Returns the last ``held_out`` of them."""
    held: deque[HeldOut] = deque(maxlen=held_out)
    if growing.done:
        digests = []
        for image in filling.seen(growing.done):
            held.append(image.held)
            digests.append(image.digest)
        growing.check_seen(digests)
        if progress is not None:
            progress(growing.done, total)
    for image in filling.encoded():
        growing.append(image.rows, image.digest)
        held.append(image.held)
        if progress is not None:
            progress(growing.done, total)
    if not growing.done:
        raise ValueError(f"murf_fast.{WHAT}: `images` must hold at least one image")
    return list(held)


def digest_of(image: Tensor, mask: Tensor | None) -> str:
    """What stands for the pixels of an image (1, 3, H, W), and for those of its foreground: functions have no name by
    which one is told from another."""
    digest = hashlib.sha256(f"{tuple(image.shape)} {image.dtype}".encode())
    for pixels in (image, mask):
        if pixels is not None:
            digest.update(pixels.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
