"""FeatUp's joint bilateral upsampler, run by this library."""

from __future__ import annotations

import importlib
import importlib.util
import types
from typing import Any

from torch import Tensor

from murf_fast.nn.guided._jbu_levels import passed_over, run_levels
from murf_fast.ops import adaptive_conv
from murf_fast.patch._replacements import insert_module, replace, unpatch

_EXTENSION = "featup.adaptive_conv_cuda.adaptive_conv"
_UPSAMPLERS = "featup.upsamplers"
_original = "_forward_without_murf_fast"


def featup() -> None:
    """Replaces ``AdaptiveConv.apply`` and ``JBUStack.forward`` of the installed package ``featup``; see ``unpatch``.

    Works where FeatUp's C++/CUDA extension is missing or does not load, if called before ``featup.upsamplers`` is
    imported: its place is taken by a module that holds ``AdaptiveConv``. Models that exist already are affected, too;
    weights stay where they are. Models whose levels have hooks or replaced parts take the original's way. Calling it
    again changes nothing.

    ``AdaptiveConv`` then has its true gradient: FeatUp's CUDA extension fills 7 of 49 taps of the filters' gradient.

    Raises:
        ModuleNotFoundError: There is no package ``featup``.

    Memory: as :func:`murf_fast.adaptive_conv` and :meth:`murf_fast.nn.JBUStack.forward`.

    Source: github.com/mhamilton723/FeatUp.
    """
    if importlib.util.find_spec("featup") is None:
        raise ModuleNotFoundError("murf_fast.patch.featup: the package featup is not installed", name="featup")
    extension: Any
    try:
        extension = importlib.import_module(_EXTENSION)
    except ImportError:  # not built for this machine, or for another torch
        extension = types.ModuleType(_EXTENSION, "Stands in for FeatUp's compiled extension, which does not load.")
        extension.AdaptiveConv = type("AdaptiveConv", (), {"__doc__": "Applied by murf_fast.adaptive_conv."})
        insert_module(extension)
    try:
        upsamplers = importlib.import_module(_UPSAMPLERS)
    except BaseException:
        unpatch()
        raise
    if getattr(upsamplers.JBUStack.forward, "__module__", None) == __name__:
        return
    for owner in {extension.AdaptiveConv, upsamplers.AdaptiveConv}:  # two, if an earlier stand-in is still in use
        replace(owner, "apply", staticmethod(_apply))
    replace(upsamplers.JBUStack, _original, upsamplers.JBUStack.forward)
    replace(upsamplers.JBUStack, "forward", _forward)


def _apply(input: Tensor, filters: Tensor) -> Tensor:
    """(B, C, H, W) of a padded input (B, C, H + D - 1, W + D - 1) and filters (B, H, W, D, D)."""
    kernels = filters.flatten(3).permute(0, 3, 1, 2)
    return adaptive_conv(input, kernels, mode=None, padding=None)


def _forward(self: Any, source: Tensor, guidance: Tensor) -> Tensor:
    levels = [(name, getattr(self, name)) for name in ("up1", "up2", "up3", "up4")]
    if passed_over(levels, self.fixup_proj) is not None:
        return getattr(self, _original)(source, guidance)
    return run_levels(
        "JBUStack", levels, [2] * 4, [source], guidance, mode="bicubic", final=self.fixup_proj, own=False
    )[0]
