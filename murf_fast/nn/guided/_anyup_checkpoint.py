"""AnyUp's released checkpoints: where the weights are, and the shape of the module they fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from murf_fast.nn._checkpoint_files import Checkpoint, open_checkpoint
from murf_fast.nn._checkpoints import few

_ATTENTION = "cross_decode.cross_attn"
# Whatever these are called, they are there, and tell all sizes.
_TELLING = ("image_encoder.0.weight", "key_features_encoder.0.basis", "aggregation.0.weight", "rope.freqs")
_FEATURES, _OUTPUT = "key_features_encoder.", f"{_ATTENTION}.attention.out_proj"


@dataclass(frozen=True)
class Layout:
    """The arguments of the module that the weights fit."""

    qk_dim: int
    input_dim: int
    kernel_size: int
    kernel_size_lfu: int
    lfu_dim: int


def read(checkpoint: str | PathLike[str] | Mapping[str, Any], values: str = "mean") -> tuple[Layout, Checkpoint]:
    """The weights under the names of the dense model, and their layout.

    With ``values="split"`` they may lack an output projection.
    """
    opened = open_checkpoint("AnyUp", checkpoint)
    weights = canonical(opened.weights)
    if lacks_output_projection(weights):
        if values != "split":
            raise ValueError(
                f"murf_fast.AnyUp: {opened.origin} has no {_OUTPUT}, as Falcon Perception's, whose heads share out the "
                'channels: say `values="split"`, and `image_range=(-1, 1)` for images as it takes them'
            )
        weights = with_output_projection(weights)
    without_features = not any(name.startswith(_FEATURES) for name in weights)
    telling = [name for name in _TELLING if not (without_features and name.startswith(_FEATURES))]
    if not all(name in weights and weights[name].ndim >= 2 for name in telling):
        raise ValueError(
            f"murf_fast.AnyUp: {opened.origin} must hold AnyUp's weights, {', '.join(_TELLING)} among them; got the "
            f"keys {few(opened.weights)}"
        )
    first = weights["image_encoder.0.weight"]
    sizes = first.shape[0], first.shape[1], first.shape[-1]
    if without_features and weights["aggregation.0.weight"].shape[1] == first.shape[0]:
        return Layout(*sizes, 5, 0), Checkpoint(opened.origin, weights)
    basis = weights.get(f"{_FEATURES}0.basis", first)
    return Layout(*sizes, basis.shape[-1], basis.shape[0]), Checkpoint(opened.origin, weights)


def lacks_output_projection(weights: Mapping[str, Tensor]) -> bool:
    """As the state dicts of Falcon Perception's AnyUp, whose attention is not torch's module."""
    return f"{_ATTENTION}.attention.in_proj_weight" in weights and not any(n.startswith(_OUTPUT) for n in weights)


def with_output_projection(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with one of zeros: it has no influence."""
    of_queries = weights[f"{_ATTENTION}.attention.in_proj_weight"].chunk(3)[0]
    nothing = {
        f"{_OUTPUT}.weight": torch.zeros_like(of_queries),
        f"{_OUTPUT}.bias": of_queries.new_zeros(len(of_queries)),
    }
    return {**weights, **nothing}


def canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model with NATTEN's attention, under the names of the dense one; others as they are.

    NATTEN's has no projection of values and no output projection; both are without influence, and zero here.
    """
    weights = dict(state)
    if f"{_ATTENTION}.q_proj.weight" not in weights:
        return weights
    missing = [
        name
        for name in (
            *(f"{_ATTENTION}.{p}_proj.{n}" for p in "qk" for n in ("weight", "bias")),
            *(f"cross_decode.norm_{p}.weight" for p in "qk"),
        )
        if name not in weights
    ]
    if missing:
        raise ValueError(f"murf_fast.AnyUp: the checkpoint has the names of use_natten=True, but lacks {few(missing)}")
    for kind in ("weight", "bias"):
        of_q, of_k = (weights.pop(f"{_ATTENTION}.{p}_proj.{kind}") for p in "qk")
        of_q, of_k = (w.flatten(1) if kind == "weight" else w for w in (of_q, of_k))
        nothing = torch.zeros_like(of_q)
        weights[f"{_ATTENTION}.attention.in_proj_{kind}"] = torch.cat([of_q, of_k, nothing])
        weights[f"{_ATTENTION}.attention.out_proj.{kind}"] = nothing
    for p in "qk":
        weights[f"{_ATTENTION}.norm_{p}.weight"] = weights.pop(f"cross_decode.norm_{p}.weight")
    return weights
