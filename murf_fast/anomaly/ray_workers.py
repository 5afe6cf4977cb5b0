"""Workers of a cluster of Ray for fits and for banks that fit no single memory."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from murf_fast import _arguments

if TYPE_CHECKING:
    from murf_fast.anomaly._patches import PatchEncoder
    from murf_fast.anomaly.sharded_index import ShardedIndex
    from murf_fast.anomaly.shards._ray import Pool
    from murf_fast.anomaly.shards._ray_fit import RayFit

WHAT = "RayWorkers"
DEVICES = ("cpu", "cuda")


class RayWorkers:
    """Workers of Ray, one process each, on all machines of a cluster, while the block lasts.

    ::

        with RayWorkers(address="auto", workers=8) as cluster:
            detector.fit(paths, folder="/shared/bank", cluster=cluster)
            served = MultiResolutionDetector.load("/shared/bank", encoder, cluster=cluster)
            served.score(image)

    A worker that dies is replaced, what it held is made again from the folder, and what it was asked is asked again;
    a question that three workers die of is given up by name.

    Args:
        address: Of the cluster; None: ``$RAY_ADDRESS``, one that runs here, else a new one of this machine.
        workers: How many; None: as many as the cluster has room for.
        threads: CPU threads of each; None: torch's number here. Bits of features may depend on it.
        device: ``"cpu"`` or ``"cuda"``, with a GPU each.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        TypeError, ValueError: An argument is wrong; no cluster answers, or it has no room (when the block begins).
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        workers: int | None = None,
        threads: int | None = None,
        device: str = "cpu",
    ) -> None:
        if address is not None and not isinstance(address, str):
            raise TypeError(f"murf_fast.{WHAT}: `address` must be text or None, got {address!r}")
        self._address = address
        self._workers = None if workers is None else _arguments.integer(WHAT, "workers", workers, 1)
        threads = torch.get_num_threads() if threads is None else threads
        self._threads = _arguments.integer(WHAT, "threads", threads, 1)
        self._device = _arguments.choice(WHAT, "device", device, DEVICES)
        self._pool: Pool | None = None
        self._opened = contextlib.ExitStack()
        self._numbers = itertools.count()
        try:
            import ray  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"murf_fast.{WHAT}: needs ray: pip install 'murf-fast[ray]'", name=error.name
            ) from error

    def __enter__(self) -> RayWorkers:
        from murf_fast import _ray_cluster
        from murf_fast.anomaly.shards._ray import Pool

        gpus = 1 if self._device == "cuda" else 0
        with contextlib.ExitStack() as opened:
            opened.enter_context(_ray_cluster.joined(self._address))
            count = _ray_cluster.room(self._workers, self._threads, gpus)
            self._pool = Pool(count, self._threads, gpus)
            opened.callback(self._pool.close)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()
        self._pool = None

    def __repr__(self) -> str:
        state = "not entered" if self._pool is None else f"{len(self._pool)} workers"
        return f"RayWorkers({state} of {self._threads} threads, device={self._device!r})"

    def _entered(self) -> Pool:
        if self._pool is None:
            raise ValueError(f"murf_fast.{WHAT}: is used within `with RayWorkers(...) as cluster:`")
        return self._pool

    def _fit(self, patches: PatchEncoder, images: Iterable[Any], batch: int | None) -> RayFit:
        """The images of a fit, to be encoded by the workers."""
        from murf_fast.anomaly.shards._ray_fit import RayFit

        return RayFit(self._entered(), self._device, patches, images, batch)

    def _sharded(self, folder: Path, files: Sequence[str]) -> Callable[[int, Tensor, dict[str, Any]], ShardedIndex]:
        """What prepares banks of a detector, by their number, for searches by the workers."""
        from murf_fast.anomaly.shards._ray_search import search_shards
        from murf_fast.anomaly.shards.rows import Range

        pool = self._entered()

        def sharded(number: int, bank: Tensor, options: dict[str, Any]) -> ShardedIndex:
            rows = Range(folder.resolve(), files[number], len(bank), 0, len(bank))
            name = f"bank {next(self._numbers)} of a folder"
            return search_shards(pool, name, rows, self._device, options)

        return sharded
