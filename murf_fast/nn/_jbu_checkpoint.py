"""Released checkpoints of joint bilateral upsamplers: where the weights are, and the shape of the module they fit."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

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


def read(checkpoint: str | PathLike | Mapping) -> tuple[Layout, dict[str, Tensor]]:
    """The weights under the names of a stack, and its layout."""
    state = checkpoint if isinstance(checkpoint, Mapping) else _file(Path(checkpoint))
    state = state.get("state_dict", state)
    if any(key.startswith(_PREFIX) for key in state):
        weights = {k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)}
        norm = {k.removeprefix(_CHANNEL_NORM): v for k, v in state.items() if k.startswith(_CHANNEL_NORM)}
        weights |= {f"norm.{name}": value for name, value in norm.items()}
    else:
        weights = dict(state)
    first = next((name for name in ("up1", "up") if f"{name}.fixup_proj.0.bias" in weights), None)
    if first is None or f"{first}.range_proj.0.weight" not in weights:
        raise ValueError(
            "murf_fast.JBUStack: the checkpoint must hold up1.range_proj.0.weight and up1.fixup_proj.0.bias (FeatUp), "
            f"or both for `up` (SimFeatUp), perhaps behind {_PREFIX!r}; got the keys {few(state)}"
        )
    taps = weights[f"{first}.fixup_proj.0.bias"].numel()
    final = weights.get("fixup_proj.1.weight")
    layout = Layout(
        dim=None if final is None else final.shape[0],
        shared=first == "up",
        radius=math.isqrt(taps) // 2,
        norm=any(key.startswith("norm.") for key in weights),
        guides=weights[f"{first}.range_proj.0.weight"].shape[1],
    )
    return layout, weights


def load_into(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads all of the weights, or says which are missing, unexpected or of a wrong shape."""
    expected = module.state_dict()
    missing, unexpected = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    shapes = [
        f"{key} {tuple(weights[key].shape)} (expected {tuple(expected[key].shape)})"
        for key in expected.keys() & weights.keys()
        if weights[key].shape != expected[key].shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"murf_fast.{type(module).__name__}: the checkpoint does not fit; missing keys: {few(sorted(missing))}; "
            f"unexpected keys: {few(sorted(unexpected))}; wrong shapes: {few(sorted(shapes))}"
        )
    module.load_state_dict(weights)


def _file(path: Path) -> Mapping:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"murf_fast.JBUStack: {path.name} holds more than tensors and plain values, and unpickling that could run "
            f"any code; load it yourself if you trust it and pass its state dict. torch says: {error}"
        ) from error
