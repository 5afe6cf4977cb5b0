"""Whether a call needs PyTorch's dispatcher, which takes twenty of a small call's thirty microseconds.

The dispatcher is for derivatives, transforms, tracers, modes, subclasses and profilers. In a plain call none of them is
there, and the op's implementation can be called at once. Everything that takes part shows in the keys of the tensors,
in the keys that the thread includes and excludes, or in one of the few flags asked for below; what is unknown is not
plain. (An ExecutionTraceObserver that runs without a profiler is not seen: torch does not say that it is there.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from murf_fast._torch_versions import any_requires_grad


def _made() -> Callable[[Iterable[Tensor]], bool]:
    """:func:`is_plain`, with what it asks for at hand; None of torch's functions for that are public."""
    from torch._C import (
        DispatchKey,
        DispatchKeySet,
        _dispatch_keys,
        _dispatch_tls_local_exclude_set,
        _dispatch_tls_local_include_set,
        _len_torch_function_stack,
        is_grad_enabled,
    )
    from torch._C._autograd import _profiler_enabled

    def keys(*names: str) -> int:
        made = DispatchKeySet(getattr(DispatchKey, names[0]))
        for name in names[1:]:
            made = made.add(getattr(DispatchKey, name))
        return made.raw_repr()

    def of_thread() -> tuple[int, int]:
        return _dispatch_tls_local_include_set().raw_repr(), _dispatch_tls_local_exclude_set().raw_repr()

    def look() -> None:
        idle.add(of_thread())
        with torch.inference_mode():
            idle.add(of_thread())

    # In a thread of its own: whoever imports this may be within a mode.
    idle: set[tuple[int, int]] = set()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    kinds = {Tensor, torch.nn.Parameter}
    # The latter two are those of a tensor made in inference mode.
    of_tensors = {
        *(keys(d, "ADInplaceOrView", f"Autograd{d}", f"Autocast{d}") for d in ("CPU", "CUDA")),
        *(keys(d, f"Autocast{d}") for d in ("CPU", "CUDA")),
    }

    def is_plain(tensors: Iterable[Tensor]) -> bool:
        if (
            torch.compiler.is_compiling()  # first, so that a compiler sees nothing of the rest
            or of_thread() not in idle
            or _len_torch_function_stack()
            or _profiler_enabled()
            or forward_ad._current_level >= 0
            or (is_grad_enabled() and any_requires_grad(tensors))
        ):
            return False
        for x in tensors:  # noqa: SIM110 (twice as fast)
            if type(x) not in kinds or _dispatch_keys(x).raw_repr() not in of_tensors:
                return False
        return True

    return is_plain


def _never(tensors: Iterable[Tensor]) -> bool:
    return False


try:
    is_plain = _made()
except (AttributeError, ImportError):  # another torch
    is_plain = _never
