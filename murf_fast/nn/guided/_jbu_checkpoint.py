"""Released checkpoints of joint bilateral upsamplers: where the weights are, and the shape of the module they fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from murf_fast.nn._checkpoint_files import Checkpoint, open_checkpoint
from murf_fast.nn._checkpoints import few

_PREFIX = "upsampler."
_CHANNEL_NORM = "model.1.norm."


@dataclass(frozen=True)
class Layout:
    """The arguments of the stack that the weights fit."""

    dim: int | None
    shared: bool
    radius: int
    norm: bool
    guides: int


def read(checkpoint: str | PathLike[str] | Mapping[str, Any]) -> tuple[Layout, Checkpoint]:
    """The weights under the names of a stack, and its layout."""
    opened = open_checkpoint("JBUStack", checkpoint)
    state = opened.weights
    if any(key.startswith(_PREFIX) for key in state):
        weights = {k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)}
        norm = {k.removeprefix(_CHANNEL_NORM): v for k, v in state.items() if k.startswith(_CHANNEL_NORM)}
        weights |= {f"norm.{name}": value for name, value in norm.items()}
    else:
        weights = dict(state)
    first = next((name for name in ("up1", "up") if f"{name}.fixup_proj.0.bias" in weights), None)
    if first is None or getattr(weights.get(f"{first}.range_proj.0.weight"), "ndim", 0) < 2:
        raise ValueError(
            f"murf_fast.JBUStack: {opened.origin} must hold up1.range_proj.0.weight and up1.fixup_proj.0.bias "
            f"(FeatUp), or both for `up` (SimFeatUp), perhaps behind {_PREFIX!r}; got the keys {few(state)}"
        )
    taps = weights[f"{first}.fixup_proj.0.bias"].numel()
    final = weights.get("fixup_proj.1.weight")
    layout = Layout(
        dim=final.shape[0] if final is not None and final.ndim else None,
        shared=first == "up",
        radius=math.isqrt(taps) // 2,
        norm=any(key.startswith("norm.") for key in weights),
        guides=weights[f"{first}.range_proj.0.weight"].shape[1],
    )
    return layout, Checkpoint(opened.origin, weights)
