"""A torchvision of names only, in the process that asks for it, so that timm and OpenCLIP can be imported without it.

Neither needs it for a vision transformer: they name its transforms, data sets and a frozen batch norm on the way. A
wheel of torchvision fits one build of torch, and that of the package index is one for CUDA.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types


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


def install() -> None:
    """Before what needs it is imported; nothing where torchvision is installed."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(Finder())
