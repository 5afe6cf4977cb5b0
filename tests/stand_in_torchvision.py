"""A torchvision of names only, while timm or OpenCLIP is imported in a test's process without it.

Neither needs it for a vision transformer: they name its transforms, data sets and a frozen batch norm on the way. A
wheel of torchvision fits one build of torch, and that of the package index is one for CUDA.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

import pytest


class Anything(type):
    """The class of classes that have every name, and do nothing."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Names(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Names(spec.name)

    def exec_module(self, module):
        pass


def imported(name: str) -> types.ModuleType:
    """A package that names torchvision, or a skip where it is not installed. The names are gone when it is imported."""
    if name in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return pytest.importorskip(name)
    finder = Finder()
    sys.meta_path.append(finder)
    try:
        return pytest.importorskip(name)
    finally:
        sys.meta_path.remove(finder)
        # Others ask whether torchvision is there, and would find it.
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
