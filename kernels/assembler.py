"""The assembler of kernels for sm_90.

Triton 3.6 brings ptxas 12.8 for the chips before sm_100. Of descriptors of operands in shared memory that it keeps in
registers for a loop, it can lose the address: products of warp groups then read another place, as the gradient of q did
on an H200. benchmarks/sass/descriptors.py finds such code; ptxas 12.9, which the same wheel brings for sm_100, has not
made any of ours.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable

import triton
from triton.runtime import JITFunction

from murf_fast.kernels.launch import INTERPRETED

OLDEST = (12, 9)
# What ptxas does anyway. It tells Triton's cache, which does not know of the change, from what the other one has made.
MARK = "--opt-level 3"
_lock = threading.Lock()


class Kernel(JITFunction):
    """A kernel that is launched, as ``triton.jit`` makes it, but for its assembler."""

    def create_binder(self):
        found = super().create_binder()
        self.compile = functools.partial(compiled, self.compile)
        return found


def kernel(function: Callable | None = None, **options) -> Kernel | Callable:
    """Instead of ``triton.jit``, of functions that the host launches; with options or without."""
    if function is None:
        return functools.partial(kernel, **options)
    return triton.jit(function, **options) if INTERPRETED else Kernel(function, **options)


def compiled(compile_: Callable, src, target, options: dict, **others):
    """``triton.compile`` with an assembler that can be trusted with ``target``."""
    with _lock:
        options, better = marked(target, options), _better() if needs_other(target) else None
        if better is None:
            return compile_(src, target=target, options=options, **others)
        with triton.knobs.nvidia.scope():
            triton.knobs.nvidia.ptxas = better
            return compile_(src, target=target, options=options, **others)


def marked(target, options: dict) -> dict:
    """The options that a kernel is compiled, and kept, with."""
    if not needs_other(target) or _better() is None:
        return options
    return options | {"ptx_options": " ".join(filter(None, [options.get("ptx_options"), MARK]))}


def needs_other(target) -> bool:
    return target.backend == "cuda" and 90 <= target.arch < 100 and _version(triton.knobs.nvidia.ptxas) < OLDEST


@functools.cache
def _better() -> str | None:
    tool = getattr(triton.knobs.nvidia, "ptxas_blackwell", None)
    if tool is not None and _version(tool) >= OLDEST:
        return tool.path
    warnings.warn(
        f"murf_fast: kernels for sm_90 go through ptxas {triton.knobs.nvidia.ptxas.version}, which is known to lose "
        "operands of matrix products: set TRITON_PTXAS_PATH to one of CUDA 12.9 or later",
        stacklevel=2,
    )
    return None


def _version(tool) -> tuple[int, ...]:
    return tuple(int(part) for part in tool.version.split("."))
