"""Checkpoint files, and linear heads under the names that published checkpoints give them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Naming:
    """Where a code base keeps its 1x1 convolution and its batch norm."""

    source: str
    convolution: str
    norm: str | None = None
    norm_optional: bool = False


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds, under the names of the modules."""

    naming: Naming
    convolution: dict[str, Tensor]
    norm: dict[str, Tensor] | None

    @property
    def shape(self) -> tuple[int, int]:
        """(K, D) of the convolution."""
        return tuple(self.convolution["weight"].shape[:2])

    def load_into(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d | None) -> None:
        convolution.load_state_dict(self.convolution)
        if norm is not None:
            norm.load_state_dict(self.norm)


def read(what: str, state_dict: Mapping[str, Tensor], namings: Sequence[Naming]) -> Weights:
    """The weights in ``state_dict``, in the first naming whose convolution it holds.

    Raises:
        ValueError: No naming fits, a key is missing or unknown, or a shape is wrong; the message names the keys.
    """
    naming = next((n for n in namings if f"{n.convolution}.weight" in state_dict), None)
    if naming is None:
        known = ", ".join(f"{n.convolution}.weight ({n.source})" for n in namings)
        raise ValueError(f"murf_fast.{what}: `state_dict` must hold one of {known}; got the keys {few(state_dict)}")
    convolution = {name: f"{naming.convolution}.{name}" for name in ("weight", "bias")}
    norm = {name: f"{naming.norm}.{name}" for name in _NORM} if naming.norm else {}
    if naming.norm_optional and not any(key in state_dict for key in norm.values()):
        norm = {}
    expected = {*convolution.values(), *norm.values()}
    missing, unknown = expected - state_dict.keys(), state_dict.keys() - expected
    if missing or unknown:
        raise ValueError(
            f"murf_fast.{what}: `state_dict` has the names of {naming.source}, whose head holds "
            f"{few(sorted(expected))}; missing: {few(sorted(missing))}; unknown: {few(sorted(unknown))}. "
            "Pass the entries of the head only"
        )
    weights = {name: state_dict[key] for name, key in convolution.items()}
    shape = tuple(weights["weight"].shape)
    if len(shape) == 2:
        weights["weight"] = weights["weight"][:, :, None, None]
    elif len(shape) != 4 or shape[2:] != (1, 1):
        raise ValueError(f"murf_fast.{what}: `{naming.convolution}.weight` must be (K, D, 1, 1), got {shape}")
    lengths = {convolution["bias"]: shape[0], **{norm[name]: shape[1] for name in norm if name != _NORM[-1]}}
    for key, length in lengths.items():
        if tuple(state_dict[key].shape) != (length,):
            raise ValueError(
                f"murf_fast.{what}: `{key}` must have shape ({length},), as {naming.convolution}.weight is {shape}, "
                f"got {tuple(state_dict[key].shape)}"
            )
    return Weights(naming, weights, {name: state_dict[key] for name, key in norm.items()} or None)


def few(keys) -> str:
    keys = list(keys)
    return (", ".join(keys[:12]) or "none") + (f", ... ({len(keys)} in all)" if len(keys) > 12 else "")


def tensors_of(what: str, path: Path) -> Mapping:
    """What a ``.safetensors`` file or a pickle of tensors and plain values holds."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"murf_fast.{what}: {path.name} holds more than tensors and plain values, and unpickling that could run "
            f"any code; load it yourself if you trust it and pass its state dict. torch says: {error}"
        ) from error


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
