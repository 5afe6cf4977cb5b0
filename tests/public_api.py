"""The public names and their signatures, one a line. ``python tests/public_api.py`` prints them: a change of what it
prints is a change for users, and goes into tests/golden/public_api.txt by intention.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import ForwardRef

PACKAGES = ("murf_fast", "murf_fast.anomaly", "murf_fast.data", "murf_fast.nn", "murf_fast.patch", "murf_fast.windows")


def public_api() -> Iterator[str]:
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in sorted(getattr(module, "__all__", None) or _defined(module)):
            yield from _described(f"{package}.{name}", getattr(module, name))


def _defined(module: ModuleType) -> list[str]:
    return [n for n, v in vars(module).items() if n[0] != "_" and getattr(v, "__module__", None) == module.__name__]


def _described(name: str, value: object) -> Iterator[str]:
    if inspect.isclass(value):
        yield f"{name}{_signature(value)}"
        own = [vars(kind) for kind in reversed(value.__mro__) if kind.__module__.split(".")[0] == "murf_fast"]
        for member, defined in sorted({name: x for v in own for name, x in v.items()}.items()):
            if member.startswith("_") and member != "__call__":
                continue
            if isinstance(defined, property):
                yield f"{name}.{member}: property"
            elif isinstance(defined, (classmethod, staticmethod)) or inspect.isfunction(defined):
                yield f"{name}.{member}{_signature(getattr(value, member))}"
    elif callable(value):
        yield f"{name}{_signature(value)}"
    else:
        yield f"{name}: {type(value).__name__}"


def _signature(value: object) -> str:
    if inspect.isclass(value) and issubclass(value, Exception):
        return "(Exception)"
    signature = inspect.signature(value)
    parameters = [p.replace(annotation=_written(p.annotation)) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=_written(signature.return_annotation)))


def _written(annotation: object) -> object:
    """Named tuples hold references where functions hold text; Python 3.14 prints the two differently."""
    return annotation.__forward_arg__ if isinstance(annotation, ForwardRef) else annotation


if __name__ == "__main__":
    print(*public_api(), sep="\n")
