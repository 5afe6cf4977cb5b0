"""Which backends exist here, why another does not, and which one a call takes.

``reference`` is plain PyTorch and always there; ``native`` is the C++ extension, for CPU tensors; ``triton`` is for
CUDA tensors (and, with ``TRITON_INTERPRET=1``, for CPU tensors in Triton's interpreter, for tests). What
``torch.export`` captures holds ``auto``: the choice is that of the process, and of the tensors, that run it.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from murf_fast import _fork
from murf_fast._constant import constant_while_compiling
from murf_fast._torch_versions import is_exporting
from murf_fast.annotations import Backend

VARIABLE = "MURF_FAST_BACKEND"
NAMES = ("reference", "native", "triton")
OLDEST_TRITON = (3, 6)
AUTO = "auto"  # in exported graphs alone, see `resolve`

_variables, _encoded = getattr(os.environ, "_data", os.environ), functools.cache(getattr(os.environ, "encodekey", str))
_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("murf_fast_backend", default=None)


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot take the call; the message holds every reason."""


@contextlib.contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Within the block every operation of this thread takes backend ``name`` or raises.

    Under ``torch.compile`` and ``torch.export`` the choice is made when the graph is traced.
    """
    token = _override.set(_known(name, "`use_backend`"))
    try:
        yield
    finally:
        _override.reset(token)


def reasons_against(name: str, device_type: str, dtype: torch.dtype | None = None) -> list[str]:
    """Every reason why backend ``name`` cannot work on tensors of ``device_type`` (and ``dtype``); empty if it can."""
    reasons: list[str] = []
    if name == "reference":
        return reasons
    if dtype == torch.float64:
        reasons.append("float64 runs through the reference only")
    if name == "native":
        if device_type != "cpu":
            reasons.append(f"native kernels take CPU tensors, these are on {device_type}")
        reasons += native_problems()
    else:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device_type == "cpu" and not interpreted:
            reasons.append("Triton takes CPU tensors only in its interpreter (TRITON_INTERPRET=1)")
        elif device_type not in ("cpu", "cuda"):
            reasons.append(f"Triton kernels take CUDA tensors, these are on {device_type}")
        reasons += triton_problems()
    return reasons


@functools.cache
def native_problems() -> list[str]:
    """Why the C++ extension cannot be used, or nothing."""
    from murf_fast import _extension

    error = _extension.load_error()
    if error is None:
        return []
    return [
        f"the C++ extension is not built or does not load ({error}); reinstall with a C++20 compiler at hand: "
        "`MURF_FAST_REQUIRE_NATIVE=1 pip install --force-reinstall --no-deps murf-fast`"
    ]


@functools.cache
def triton_problems() -> list[str]:
    """Why Triton cannot be used, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed (`pip install triton`, Linux only)"]
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return [f"triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}"]
    return []


def asked_for(request: str | None) -> str | None:
    """The backend that a call names, or its surroundings; None where nobody does."""
    if request is not None and not isinstance(request, str):
        raise TypeError(f"murf_fast: `backend` must be one of {NAMES}, got {request!r}")
    if request is not None:
        return request
    return _override.get() or _environment(VARIABLE) or None


def _environment(name: str) -> str | None:
    """``os.environ.get``, which takes 0.8 us where a variable is absent; the dictionary behind it takes a tenth."""
    raw = _variables.get(_encoded(name))
    return None if raw is None else os.environ[name]


@constant_while_compiling
def resolve(request: str | None, device_type: str, dtype: torch.dtype) -> Any:
    """The backend that a call on such tensors takes. ``request`` beats ``use_backend`` beats ``MURF_FAST_BACKEND``.

    Where nobody asks and ``torch.export`` looks on, it is ``"auto"``: a graph runs elsewhere, and later.
    """
    _fork.keep_torch_to_calling_thread()  # every op comes by here before its work
    asked = asked_for(request)
    if asked == AUTO and is_exporting():  # what an op of this library passes on
        return AUTO
    if asked is not None:
        _known(asked, _source(request))
        if device_type == "meta":
            return "native"
        reasons = reasons_against(asked, device_type, dtype)
        if reasons:
            raise BackendUnavailableError(
                f"murf_fast: backend {asked!r} was asked for by {_source(request)}, but: " + "; ".join(reasons)
            )
        return asked
    if dtype == torch.float64 and device_type != "meta":
        return "reference"
    if is_exporting() and device_type in ("cpu", "cuda", "meta"):
        return AUTO
    if device_type == "meta":
        return "native"
    preferred = "native" if device_type == "cpu" else "triton"
    reasons = reasons_against(preferred, device_type, dtype)
    if not reasons:
        return preferred
    _warn_once(preferred, device_type, "; ".join(reasons))
    return "reference"


@functools.cache
def _warn_once(preferred: str, device_type: str, reasons: str) -> None:
    warnings.warn(
        f"murf_fast: falling back to the slow reference on {device_type}, because backend {preferred!r} is not "
        f"available: {reasons}",
        RuntimeWarning,
        stacklevel=4,
    )


@functools.cache
def launcher(name: str) -> Any:
    """The module whose functions launch the kernels of backend ``name``."""
    if name == "native":
        from murf_fast import native

        return native
    if name == "triton":
        import murf_fast.kernels as kernels  # a checkout has them elsewhere: no attribute for a type checker

        return kernels
    if name == AUTO:
        raise ValueError("murf_fast: what is prepared for a backend cannot be made within an export; make it before")
    raise ValueError(f"murf_fast: no kernels behind backend {name!r}")


def _source(request: str | None) -> str:
    """Who asks for a backend, for messages."""
    if request is not None:
        return "`backend`"
    return "`use_backend`" if _override.get() else f"the environment variable {VARIABLE}"


def _known(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"murf_fast: {source} must be one of {NAMES}, got {name!r}")
    return name
