"""Packages of one file per operation export what their files list in ``__all__``; a file without one is shared code."""

from __future__ import annotations

import importlib
import pkgutil


def exports(package: str, path: list[str]) -> dict[str, object]:
    """Every name in an ``__all__`` of the package's modules; ``path`` is the package's ``__path__``."""
    found: dict[str, object] = {}
    for info in pkgutil.iter_modules(path):
        module = importlib.import_module(f"{package}.{info.name}")
        for name in getattr(module, "__all__", ()):
            if name in found:
                raise ImportError(f"{package}: two modules export {name!r}")
            found[name] = getattr(module, name)
    return found
