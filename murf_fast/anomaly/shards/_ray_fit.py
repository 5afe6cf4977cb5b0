"""A fit by workers of Ray: they encode the images and choose the rows of coresets; whoever fits writes the files."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
import torch
from torch import Tensor

from murf_fast.annotations import Projection
from murf_fast.anomaly import _images
from murf_fast.anomaly._filling import Filled, digest_of
from murf_fast.anomaly._growing import GrowingBanks
from murf_fast.anomaly._patches import WHAT, HeldOut, LookedAt, PatchEncoder, Patches
from murf_fast.anomaly._selection import Selection
from murf_fast.anomaly.sharded_index import ShardedIndex
from murf_fast.anomaly.shards._ray import Pool, Question, RayShards, each
from murf_fast.anomaly.shards._ray_search import search_shards
from murf_fast.anomaly.shards.k_center import KCenterShard, select
from murf_fast.anomaly.shards.rows import Range, bounds, rows_of
from murf_fast.ops._random_projection import projection as random_projection
from murf_fast.ops.k_center_greedy import ROWS, met

_numbers = itertools.count()


@dataclass(frozen=True)
class _Planned:
    """An image, what to call it in messages, and how many patches it has."""

    image: object
    name: str
    patches: int


class RayFit:
    """The images of a fit, encoded by workers, group by group as in one process.

    Args:
        pool: The workers.
        device: Of their models.
        patches: What encodes; it is sent to every worker.
        images: As for ``fit``. Files are read by the workers, under the same path.
        batch: So many at most share a pass.

    Raises:
        ValueError: The model cannot be sent; groups follow from masks, which nobody knows before.
    """

    def __init__(
        self, pool: Pool, device: str, patches: PatchEncoder, images: Iterable[Any], batch: int | None
    ) -> None:
        if patches.foreground is not None and batch != 1:
            raise ValueError(
                f"murf_fast.{WHAT}: `foreground` over a cluster needs batch=1, as its masks say which images share a "
                "pass"
            )
        self._pool, self._patches, self._batch, self._device = pool, patches, batch, device
        self._planned = self._plan(images)
        self._names: list[str] = []
        self._encoder = self._name("encoder")
        try:
            self._sent = ray.put(patches)
        except Exception as error:  # what does not pickle says so in many ways
            raise ValueError(f"murf_fast.{WHAT}: `encoder` cannot be sent to workers: {error}") from error

    def seen(self, count: int) -> Iterator[Filled]:
        """As for :class:`Filling`."""
        yield from self._each("seen", ([image] for image in itertools.islice(self._planned, count)))

    def encoded(self) -> Iterator[Filled]:
        """As for :class:`Filling`."""
        yield from self._each("encoded", self._patches.groups(self._planned, self._batch))

    def _each(self, method: str, groups: Iterable[list[_Planned]]) -> Iterator[Filled]:
        questions = (
            Question(method, ([(p.image, p.name) for p in group],), f"encoding {', '.join(map(_called, group))}")
            for group in groups
        )
        make = (_Encoder, (self._sent, self._device))
        yield from itertools.chain.from_iterable(each(self._pool, self._encoder, *make, questions))

    def _plan(self, images: Iterable[Any]) -> Iterator[_Planned]:
        from murf_fast import _pillow

        for i, image in enumerate(images):
            name, size = f"`images[{i}]`", _images.size_of(image, f"`images[{i}]`")
            if size is None:
                image = Path(image).resolve()
                # As stored, not upright: the number of patches is the same.
                size = _pillow.size(image)
            yield _Planned(image, name, sum(h * w for h, w in self._patches.grids(size, name)))

    def choose(self, growing: GrowingBanks) -> Callable[..., Any]:
        """What chooses the coreset of a bank, see :func:`murf_fast.anomaly._coreset.coresets`."""

        def choose(
            number: int, bank: Tensor, own: Selection, projection: Projection | None, told: Callable[[int], None]
        ) -> None:
            _Choice(self._pool, self._name("coreset"), _file(growing, number), bank, own, projection).run(told)

        return choose

    def sharded(self, growing: GrowingBanks) -> Callable[[int, Tensor, dict[str, Any]], ShardedIndex]:
        """What prepares the first rows of a bank for searches."""

        def sharded(number: int, bank: Tensor, options: dict[str, Any]) -> ShardedIndex:
            folder, file = _file(growing, number)
            name = self._name("bank")
            rows = growing.files[number].rows
            return search_shards(self._pool, name, Range(folder, file, rows, 0, len(bank)), self._device, options)

        return sharded

    def _name(self, kind: str) -> str:
        name = f"{kind} {next(_numbers)}"
        self._names.append(name)
        return name

    def close(self) -> None:
        """Workers forget the model and the banks."""
        for name in self._names:
            self._pool.drop(name)


class _Encoder:
    """The model, in a worker."""

    def __init__(self, patches: PatchEncoder, device: str) -> None:
        patches.encoder.to(device)
        self._patches = patches

    def seen(self, images: list[tuple[object, str]]) -> list[Filled]:
        return [_filled(looked, digest, []) for looked, digest in map(self._look_at, images)]

    def encoded(self, images: list[tuple[object, str]]) -> list[Filled]:
        looked, digests = zip(*map(self._look_at, images), strict=True)
        encoded = self._patches.encode(looked)
        return [_filled(*image) for image in zip(looked, digests, encoded, strict=True)]

    def _look_at(self, image: tuple[object, str]) -> tuple[LookedAt, str]:
        pixels, name = _images.as_tensor(*image), image[1]
        looked = self._patches.look_at(pixels, name)
        return looked, digest_of(pixels, looked.mask)


def _filled(looked: LookedAt, digest: str, of_image: list[Patches]) -> Filled:
    held = HeldOut.of(looked)
    kept = [None if k is None else k.cpu() for k in held.kept]
    rows = [None if p.rows is None else _alone(p.rows) for p in of_image]
    return Filled(HeldOut(kept, held.grids, held.size, held.rows), digest, rows)


def _alone(rows: Tensor) -> Tensor:
    """A copy on the CPU that shares no memory: all of a tensor's memory is sent."""
    return torch.empty(rows.shape, dtype=rows.dtype, device="cpu").copy_(rows)


class _Choice:
    """One bank's coreset."""

    def __init__(
        self, pool: Pool, name: str, file: tuple[Path, str], bank: Tensor, own: Selection, projection: Projection | None
    ) -> None:
        self._own, self._file, self._rows = own, file, len(bank)
        self._projection = None if projection is None else random_projection(projection, len(bank), bank.shape[1], 0)
        self._bounds = bounds(len(bank), len(pool), 1 if projection is None else ROWS)
        counts = [end - begin for begin, end in itertools.pairwise(self._bounds)]
        self._shards = RayShards(pool, name, counts, self._made)
        # What shards may have met beyond `own.nearest`, for one that is made anew.
        self._since: list[Tensor] = []

    def run(self, told: Callable[[int], None]) -> None:
        own = self._own
        if not own.done:
            own.chosen[0] = 0
        given = own.done
        centers = rows_of(self._shards, own.chosen[met(own.nearest, own.chosen[:given]) : given])

        def after(done: int, centers: Tensor) -> None:
            self._since.append(centers)
            if own.is_due:
                own.nearest.copy_(torch.cat([squared for (squared,) in self._shards.ask("nearest")]))
                own.save()
                self._since = [centers]
            told(done)

        self._since.append(centers)
        select(self._shards, centers, own.chosen, given, after)
        self._shards.close()

    def _made(self, shard: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        begin, end = self._bounds[shard : shard + 2]
        rows = Range(*self._file, self._rows, begin, end)
        centers = torch.cat(self._since) if self._since else None
        return _k_center_shard, (rows, self._own.nearest[begin:end].clone(), self._projection, centers)


def _k_center_shard(rows: Range, nearest: Tensor, projection: Tensor | None, centers: Tensor | None) -> KCenterShard:
    shard = KCenterShard(rows.mapped(), rows.begin, nearest, projection)
    if centers is not None:
        shard.farthest(centers, 1)
    return shard


def _file(growing: GrowingBanks, number: int) -> tuple[Path, str]:
    """Where the rows of a bank are, for other machines: file systems over a network show them what is synced."""
    growing.files[number].sync()
    path = cast("Path", growing.files[number].path)  # a fit over a cluster has a folder
    return path.parent.resolve(), path.name


def _called(planned: _Planned) -> str:
    return str(planned.image) if isinstance(planned.image, os.PathLike) else planned.name
