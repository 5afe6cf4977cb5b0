"""The options by which commands use a cluster of Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console

from murf_fast._ray_address import check_address, place
from murf_fast.cli._interrupts import ending_at_once

if TYPE_CHECKING:
    from murf_fast.anomaly import RayWorkers

PANEL = "Cluster"
DEVICES = ("cpu", "cuda")

Ray = Annotated[
    bool,
    typer.Option("--ray", help="By Ray's workers: one a GPU, or one for every --threads.", rich_help_panel=PANEL),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="Of Ray's cluster; else $RAY_ADDRESS, else this machine. Implies --ray.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, help="Ray's workers; all there is room for if left out.", show_default=False, rich_help_panel=PANEL
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        help="CPU threads of a worker; torch's number if left out.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]


@dataclass(frozen=True)
class Cluster:
    """What the options say; without ``--ray`` and ``--address`` there is none."""

    ray: bool = False
    address: str | None = None
    workers: int | None = None
    threads: int | None = None

    @property
    def is_used(self) -> bool:
        return self.ray or self.address is not None

    def check(self, device: str) -> None:
        """What can be told without starting or joining anything.

        Args:
            device: Of every worker.

        Raises:
            ModuleNotFoundError: Ray is not installed.
            ValueError: Options are given without what they are of; there is no such device; nobody listens at the
                address.
        """
        for option, value in (("--workers", self.workers), ("--threads", self.threads)):
            if value is not None and not self.is_used:
                raise ValueError(f"{option} is about Ray's workers: give --ray, too")
        if self.is_used:
            self._workers(device)
            check_address(self.address)

    @contextlib.contextmanager
    def started(self, device: str, console: Console) -> Iterator[None]:
        """Ray, joined or started, with room for the workers: before any work, as that takes seconds.

        Ctrl-C meanwhile ends the process at once, with those that Ray has started; Ray itself would need many seconds.

        Raises:
            ValueError: No cluster answers or starts, or it has no room; within the block, what is raised there.
        """
        if not self.is_used:
            yield
            return
        from murf_fast import _ray_cluster

        where = place(self.address)
        what = f"joining the cluster at {where}" if where else "joining the cluster of this machine, or starting one"
        console.print(f"Ray: {what}, which takes seconds", markup=False, soft_wrap=True)
        with contextlib.ExitStack() as opened:
            with ending_at_once(f"murf-fast: interrupted while {what}", _ray_cluster.end_processes):
                opened.enter_context(_ray_cluster.joined(self.address))
            gpus = 1 if _kind(device) == "cuda" else 0
            _ray_cluster.room(self.workers, self.threads or torch.get_num_threads(), gpus)
            yield

    @contextlib.contextmanager
    def joined(self, device: str) -> Iterator[RayWorkers | None]:
        """The workers, with ``device`` each; None where there is no cluster."""
        if not self.is_used:
            yield None
            return
        with self._workers(device) as workers:
            yield workers

    def _workers(self, device: str) -> RayWorkers:
        from murf_fast.anomaly import RayWorkers

        return RayWorkers(self.address, workers=self.workers, threads=self.threads, device=_kind(device))


def _kind(device: str) -> str:
    """``cpu`` or ``cuda``: which of its GPUs a worker gets is Ray's to say."""
    kind = device.partition(":")[0]
    if kind not in DEVICES:
        raise ValueError(f"--device must be {' or '.join(DEVICES)} with Ray, got {device!r}")
    return kind
