"""murf_fast: fast, exact kernels for dense features of frozen vision transformers at many resolutions."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from murf_fast import windows
from murf_fast.backends import BackendUnavailableError, use_backend
from murf_fast.ops import *  # noqa: F403
from murf_fast.ops import __all__ as _ops  # isort: split

from murf_fast.nn import MuRF
from murf_fast.ops._flops import register as _register_flops  # isort: split

_register_flops()  # of all ops, those of the modules too

__version__ = "0.1.0"
__all__ = ["BackendUnavailableError", "MuRF", "use_backend", "windows", *_ops]

# Their libraries are optional: they come when they are first named.
_PACKAGES = ("anomaly", "data", "patch")


if TYPE_CHECKING:
    from murf_fast import anomaly as anomaly
    from murf_fast import data as data
    from murf_fast import nn as nn
    from murf_fast import patch as patch
else:  # a checker would take any name for one of them

    def __getattr__(name: str) -> ModuleType:
        if name in _PACKAGES:
            return importlib.import_module(f"murf_fast.{name}")
        raise AttributeError(f"module 'murf_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES})
