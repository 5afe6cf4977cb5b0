"""Progress of what a command does one after another: a bar for each step, which appears when the step begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import Progress


class Steps:
    """Bars for steps by name, while it is entered."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(console=console)
        self._tasks: dict[str, Any] = {}
        self._done: dict[str, Any] = {}

    def of(self, name: str, total: int | None = None) -> Callable[[int, int | None], None]:
        """What a step is to call with (done, in all or None); ``total`` where it does not know that."""

        def progress(done: int, known: int | None) -> None:
            if name not in self._tasks:
                self._tasks[name] = self._bar.add_task(name, total=known or total)
            self._done[name] = done
            # Of images it may turn out that fewer are wanted.
            self._bar.update(self._tasks[name], completed=done, total=known or total)

        return progress

    def done(self, name: str) -> int:
        return self._done.get(name, 0)

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
