"""Attributes of other people's modules, replaced and put back."""

from __future__ import annotations

import sys
import types
from typing import Any, cast

_MISSING = object()
_undo: list[tuple[object, str, object]] = []


def replace(owner: type | types.ModuleType, name: str, value: object) -> None:
    """Sets ``owner.name`` until :func:`unpatch`."""
    _undo.append((owner, name, vars(owner).get(name, _MISSING)))
    setattr(owner, name, value)


def insert_module(module: types.ModuleType) -> None:
    """Makes ``module`` importable under its name until :func:`unpatch`."""
    _undo.append((sys.modules, module.__name__, sys.modules.get(module.__name__, _MISSING)))
    sys.modules[module.__name__] = module


def unpatch() -> None:
    """Undoes every patch, last one first. Modules that were imported thanks to one stay imported."""
    while _undo:
        owner, name, value = _undo.pop()
        if owner is sys.modules:
            if value is _MISSING:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = cast("Any", value)
        elif value is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, value)
