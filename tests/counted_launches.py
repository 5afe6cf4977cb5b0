"""What a call would launch on a GPU, counted where Triton's kernels are interpreted."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

from murf_fast import backends

ALLOCATING = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
ALLOCATING |= {"aten::fill_"}  # by conftest's poisoned memory


class Launches(TorchDispatchMode):
    """Counts torch's operations, but for those that only allocate or make a view, and Triton's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.torch, self.triton = Counter(), Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        schema = function._schema
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        # Our own ops are what their launchers do.
        if not is_view and schema.name not in ALLOCATING and function.namespace != "murf_fast":
            self.torch[schema.name] += 1
        return function(*arguments, **(options or {}))


@contextlib.contextmanager
def counted(*launchers: str) -> Iterator[Launches]:
    """Within the block, launches outside of our ops and within the ``launchers`` of Triton are counted."""
    launches, module, call = Launches(), backends.launcher("triton"), interpreter.GridExecutor.__call__
    originals = {name: getattr(module, name) for name in launchers}

    def within(launcher):
        def counting(*arguments, **options):
            with launches:
                return launcher(*arguments, **options)

        return counting

    def one_kernel(self, *arguments, **options):
        launches.triton[self.fn.__name__] += 1
        with _disable_current_modes():
            return call(self, *arguments, **options)

    for name, launcher in originals.items():
        setattr(module, name, within(launcher))
    interpreter.GridExecutor.__call__ = one_kernel
    try:
        with launches:
            yield launches
    finally:
        interpreter.GridExecutor.__call__ = call
        for name, launcher in originals.items():
            setattr(module, name, launcher)
