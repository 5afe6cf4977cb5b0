"""The options by which commands use a cluster of Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
import typer

if TYPE_CHECKING:
    from murf_fast.anomaly import RayWorkers

PANEL = "Cluster"

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

    def check(self) -> None:
        """Raises a ValueError where options are given without what they are of, a ModuleNotFoundError without Ray."""
        if self.is_used:
            self._workers("cpu")
        for option, value in (("--workers", self.workers), ("--threads", self.threads)):
            if value is not None and not self.is_used:
                raise ValueError(f"{option} is about Ray's workers: give --ray, too")

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

        kind = torch.device(device).type
        return RayWorkers(self.address, workers=self.workers, threads=self.threads, device=kind)
