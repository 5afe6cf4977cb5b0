"""What is measured: every case once, for the CPU suites and the GPU suite alike.

A case builds its data on a device and names its contenders: ours, and what people run today at its best (both memory
layouts where the layout is free, ``torch.compile`` of the plain graph). Cases live in ``ops/<op>.py``,
``models/<model>.py`` and ``calls/overhead.py``, which register them when they are imported. So they do the smallest
calls of every kernel, for tools under which a large one would take hours, and the calls that compile it in every way
that ships.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

Function = Callable[[], Tensor]
HERE = Path(__file__).parent
FOLDERS = ("ops", "models", "calls")


@dataclass(frozen=True)
class Target:
    """A goal: at least ``ratio`` times as fast as the fastest contender whose name starts with ``against``."""

    against: str
    ratio: float


@dataclass
class Contenders:
    ours: Function
    others: dict[str, Function]
    oracle: Callable[[], Iterator[tuple[tuple, Tensor]]]
    result_bytes: int
    operations: int = 0  # floating-point operations of the matrix products, where there are any
    logits: Function | None = None  # where the result is classes: what plain PyTorch in the case's dtype chooses from
    counted: Callable[[Tensor], Tensor] | None = None  # where the result counts such classes: their counts


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    build: Callable[[str, torch.dtype], Contenders]
    dtype: torch.dtype = torch.float32
    targets: tuple[Target, ...] = ()
    write_target: float | None = None  # fraction of the streaming-write rate
    memory_target: tuple[float, str] | None = None  # times these bytes, what they are
    less_memory: tuple[str, float] | None = None  # of that contender's peak at most so much
    beside: tuple[str, str, float] | None = None  # (part, against, ratio): the ratio once both are rid of that part
    devices: tuple[str, ...] = ("cpu", "cuda")
    capturable: bool = True  # ours in a CUDA graph: no gradients, no waiting for the GPU
    facts: dict = field(default_factory=dict)  # columns of the table of whole models

    @property
    def id(self) -> str:
        return f"{self.op}: {self.name}"


_cases: list[Case] = []
_smallest: dict[str, Callable[[str], object]] = {}
_configurations: dict[str, Callable[[str, torch.dtype], object]] = {}


def case(op: str, name: str, **options):
    """Registers the function below it as a case."""

    def register(build):
        _cases.append(Case(op, name, build, **options))
        return build

    return register


def smallest(op: str):
    """Registers the function below it, of a device, as the smallest call of ``op``'s kernels, forward and backward."""

    def register(call):
        _smallest[op] = call
        return call

    return register


def configurations(op: str):
    """Registers the function below it, of a device and a dtype: calls of ``op``, forward and backward, in all that
    changes what its Triton kernels are compiled to (widths, layouts, options). Their results mean nothing.
    """

    def register(calls):
        _configurations[op] = calls
        return calls

    return register


def suites() -> list[str]:
    """Names of what has cases, operations for the most part: those of the files, none of which is imported."""
    return sorted(path.stem for path in _files())


def cases() -> list[Case]:
    """All cases, those of an operation together."""
    _load()
    return sorted(_cases, key=lambda c: c.op)


def smallest_calls() -> dict[str, Callable[[str], object]]:
    """The smallest call of every operation and model, by name."""
    _load()
    return dict(sorted(_smallest.items()))


def all_configurations() -> dict[str, Callable[[str, torch.dtype], object]]:
    """The calls that compile the kernels of every operation and model that has some, by name."""
    _load()
    return dict(sorted(_configurations.items()))


def _files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((HERE / folder).glob("*.py"))]


def _load() -> None:
    for path in _files():
        name = f"benchmarks_{path.parent.name}_{path.stem}"
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, path)
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])


_scale = 1.0


def scale_down(factor: float) -> None:
    """Shrinks every case (dry runs and tests); a result of it is never reported."""
    global _scale
    _scale = factor


def side(n: int) -> int:
    return max(2, round(n * _scale))


def classes(n: int) -> int:
    return max(2, round(n * _scale))


class Rows(list):
    """Patch rows of several sizes, or maps, compared as one tensor but not joined while the clock runs."""

    def joined(self) -> Tensor:
        return torch.cat(self, dim=1)
