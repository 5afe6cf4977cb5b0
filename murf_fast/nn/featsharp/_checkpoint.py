"""Checkpoints of FeatSharp: the parts they hold, spectral norms folded, and the shape of the modules they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from murf_fast import _arguments
from murf_fast.annotations import Size
from murf_fast.nn._checkpoint_files import Checkpoint, open_checkpoint
from murf_fast.nn._checkpoints import few

_UPSAMPLER, _ENCODER = "upsampler.", "encoder."
# The prefix of every other part, beside that of our own state dicts.
_PARTS = {
    "normalizer": ("normalizer.",),
    "bias_buffer": ("bias_buffer.",),
    "conditional_bias": ("cond_bias_transform.", "conditional_bias."),
}
# Their lengths are the channels of all inputs and of the features.
_INPUTS, _CHANNELS = "ups.0.block.ls1.gamma", "ups.0.block.ls2.gamma"
_PARAMETRIZED = ".parametrizations.weight."


@dataclass(frozen=True)
class Parts:
    """The upsampler's weights and what it is made with; and the weights of the other parts that there are."""

    upsampler: Checkpoint
    arguments: dict[str, Any]
    others: dict[str, Checkpoint]


def read(
    what: str,
    checkpoint: str | PathLike[str] | Mapping[str, Any],
    inputs: Sequence[str],
    factor: Size | None,
) -> Parts:
    """The parts of a training's checkpoint, or of an upsampler's state dict.

    Raises:
        TypeError, ValueError: As :func:`open_checkpoint`; or names, inputs and factor do not go together.
    """
    opened = open_checkpoint(what, checkpoint)
    owner = {prefix: part for part, prefixes in _PARTS.items() for prefix in prefixes} | {_UPSAMPLER: "upsampler"}
    groups: dict[str, dict[str, Tensor]] = {part: {} for part in ("upsampler", *_PARTS)}
    is_whole = any(name.startswith(_UPSAMPLER) for name in opened.weights)
    unknown = []
    for name, value in opened.weights.items():
        prefix = next((p for p in owner if name.startswith(p)), None) if is_whole else _UPSAMPLER
        if prefix is not None:
            groups[owner[prefix]][name.removeprefix(prefix).removeprefix("module.")] = value
        elif not name.startswith(_ENCODER):  # as our own state dicts have it, which is the caller's
            unknown.append(name)
    if unknown or any(groups["upsampler"].get(name, torch.tensor(0)).ndim != 1 for name in (_INPUTS, _CHANNELS)):
        raise ValueError(
            f"murf_fast.{what}: {opened.origin} must hold {_INPUTS}, {_CHANNELS} and the like, perhaps behind "
            f"{_UPSAMPLER!r} and beside {', '.join(f'{p}*' for p in owner if p != _UPSAMPLER)} and {_ENCODER}*; got "
            f"the keys {few(unknown or opened.weights)}"
        )
    weights = folded(what, groups["upsampler"])
    levels = len({name.split(".")[1] for name in weights if name.startswith("ups.")})
    found = {"jbu": any(".jbu." in name for name in weights), "tiles": "ups.0.tile_pos" in weights}
    columns, channels = len(weights[_INPUTS]), len(weights[_CHANNELS])
    last = f"ups.{levels - 1}.tile_pos"
    if factor is not None:
        factor = _arguments.pair(what, "factor", factor)
    if last in weights and weights[last].ndim == 4:
        of_tiles = tuple(weights[last].shape[2:])
        if factor not in (None, of_tiles):
            raise ValueError(f"murf_fast.{what}: `factor` must be that of the tiles, {of_tiles}, or None, got {factor}")
        factor = of_tiles
    # Without anything to upsample it has no weights.
    jbu_is_seen = factor != (1, 1)
    unlike = [name for name in found if found[name] != (name in inputs) and (name != "jbu" or jbu_is_seen)]
    if unlike or columns != len(inputs) * channels:
        has = " and ".join(name for name in found if found[name]) or "neither jbu nor tiles"
        raise ValueError(
            f"murf_fast.{what}: `inputs` must be those that {opened.origin} was trained with: it has {has}, and a "
            f"block of {columns} channels for features of {channels}; got {tuple(inputs)}"
        )
    if factor is None:
        raise ValueError(f"murf_fast.{what}: `factor` is needed: {opened.origin} has no tiles, which would tell it")
    arguments = {
        "channels": channels,
        "factor": factor,
        "progressive": levels > 1,
        "norm": "ups.0.block.norm1.weight" in weights,
    }
    others = {p: Checkpoint(opened.origin, folded(what, groups[p])) for p in _PARTS if groups[p]}
    return Parts(Checkpoint(opened.origin, weights), arguments, others)


def folded(what: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in place of the spectral reparametrizations that they were trained with.

    ``W = original (softplus(scale) + 0.05) / (u^T original v + 1e-6)``, for equal chunks of rows where there are
    several parts; in the first version of the parametrization the factor was the scale itself.
    """
    plain = {name: value for name, value in weights.items() if _PARAMETRIZED not in name}
    for name, original in weights.items():
        module, is_parametrized, rest = name.partition(_PARAMETRIZED)
        if not is_parametrized or rest != "original":
            continue
        head = f"{module}{_PARAMETRIZED}0."
        parts = sorted({int(key.split(".")[-2]) for key in weights if key.startswith(f"{head}parts.")})
        heads = [f"{head}parts.{i}." for i in parts] or [head]
        chunks = [
            _normalized(what, chunk, weights, prefix)
            for chunk, prefix in zip(original.double().chunk(len(heads)), heads, strict=True)
        ]
        plain[f"{module}.weight"] = torch.cat(chunks).to(original.dtype)
    return plain


def _normalized(what: str, chunk: Tensor, weights: Mapping[str, Tensor], prefix: str) -> Tensor:
    missing = [prefix + name for name in ("sn_scale", "_u", "_v") if prefix + name not in weights]
    if missing:
        raise ValueError(f"murf_fast.{what}: the checkpoint has a spectral norm without {few(missing)}")
    scale, u, v = (weights[prefix + name].double().flatten() for name in ("sn_scale", "_u", "_v"))
    version = int(weights.get(f"{prefix}_sn_version", torch.tensor(1)))
    factor = F.softplus(scale) + 0.05 if version >= 2 else scale
    return chunk * (factor / (u @ chunk @ v + 1e-6))
