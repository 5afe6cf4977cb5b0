"""Launchers of the C++ kernels, one file per operation, with the signatures of :mod:`murf_fast.kernels`.

Arguments have been checked by the ops. What a launcher allocates: copies of low-resolution maps whose strides a kernel
cannot walk, and statistics and partial sums as its docstring says; the kernels themselves keep a few rows per thread.

A kernel is given addresses. They are taken where a tensor of another dtype, device or shape than the kernel will walk
is refused (``_address.py``, ``_maps.py``): the last word, after the contract of the op, and the first about memory that
is allocated here.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from murf_fast._discovery import exports

globals().update(exports(__name__, __path__))

if TYPE_CHECKING:  # what is exported, is known when it runs

    def __getattr__(name: str) -> Callable[..., Any]: ...
