"""Processes made by ``fork``: the threads of OpenMP's pool do not exist there, and a parallel region waits for them for
ever. Kernels run on the calling thread in such a process, and from the first op on torch's do, too: what an op leaves
to torch (float64, products, sums of gradients) would wait as well. One made by ``spawn`` or ``forkserver`` is like any
other.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

_is_child = False


def _after_in_child() -> None:
    global _is_child
    _is_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_in_child)


def is_child() -> bool:
    return _is_child


def threads() -> int:
    """Threads that a kernel may use."""
    return 1 if _is_child else torch.get_num_threads()


def keep_torch_to_calling_thread() -> None:
    """In a process made by fork, torch's kernels run on the calling thread from here on."""
    if _is_child and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


@contextlib.contextmanager
def calling_thread_only() -> Iterator[None]:
    """In a process made by fork, torch's kernels within the block stay on the calling thread, too."""
    before = torch.get_num_threads()
    if not _is_child or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
