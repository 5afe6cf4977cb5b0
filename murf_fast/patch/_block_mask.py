"""Windows out of the block masks that Falcon Perception's AnyUp is called with."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from murf_fast import windows

_BOUNDS = ("r0", "r1", "c0", "c1")
# Reading a mask waits for its device, so every mask is read once; the original keeps its masks, too.
_known: weakref.WeakKeyDictionary[object, windows.Windows | None] = weakref.WeakKeyDictionary()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def windows_of(mask: Any, size: tuple[int, int], grid: tuple[int, int]) -> windows.Windows | None:
    """The windows of queries on a grid of ``size`` to keys on ``grid``, of a mask whose rule holds them.

    A rule of ``build_upsampler_block_mask`` is a function of four tables (H, W): the first and the last row and column
    of every query's window. None for a mask that is none of that, or of other sizes.
    """
    function = getattr(mask, "mask_mod", None)
    if not inspect.isfunction(function):
        return None
    if mask not in _known:
        _known[mask] = _read(function, mask.seq_lengths)
    rule = _known[mask]
    return rule if rule is not None and rule.out == size and rule.grid == grid else None


def _read(function: Callable[..., Any], lengths: tuple[int, int]) -> windows.Windows | None:
    names = inspect.getclosurevars(function).nonlocals
    bounds: list[Any] = [names.get(name) for name in _BOUNDS]
    columns = names.get("w_")
    if not isinstance(columns, int) or not all(isinstance(x, Tensor) and x.ndim == 2 for x in bounds):
        return None
    r0, r1 = (x[:, 0].int().cpu() for x in bounds[:2])
    c0, c1 = (x[0].int().cpu() for x in bounds[2:])
    return windows.ranges((r0, r1), (c0, c1), (lengths[1] // columns, columns))
