"""Weights into modules, and linear heads under the names that published checkpoints give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from murf_fast.nn._checkpoint_files import Checkpoint, unwrapped

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
        classes, columns = self.convolution["weight"].shape[:2]
        return classes, columns

    def load_into(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d | None) -> None:
        convolution.load_state_dict(self.convolution)
        if norm is not None:
            norm.load_state_dict(self.norm or {})


def read(what: str, state_dict: Mapping[str, Tensor], namings: Sequence[Naming]) -> Weights:
    """The weights in ``state_dict``, in the first naming whose convolution it holds.

    Raises:
        TypeError: It is no mapping.
        ValueError: No naming fits, a key is missing or unknown, or a shape is wrong; the message names the keys.
    """
    if not isinstance(state_dict, Mapping):
        got = type(state_dict).__name__
        raise TypeError(f"murf_fast.{what}: `state_dict` must be a mapping of names to tensors, got {got}")
    state_dict = unwrapped(f"{what}: `state_dict`", state_dict)
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
    for key in sorted(lengths.keys() | {convolution["weight"]}):
        if not state_dict[key].is_floating_point():
            raise ValueError(f"murf_fast.{what}: `{key}` must be floating point, got {state_dict[key].dtype}")
    return Weights(naming, weights, {name: state_dict[key] for name, key in norm.items()} or None)


def few(keys: Any) -> str:
    keys = list(keys)
    return (", ".join(keys[:12]) or "none") + (f", ... ({len(keys)} in all)" if len(keys) > 12 else "")


def load_into(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Loads all of the weights, or says which are missing, unexpected or of a wrong shape or kind."""
    weights, expected = checkpoint.weights, module.state_dict()
    missing, unexpected = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    common = sorted(expected.keys() & weights.keys())
    shapes = [
        f"{key} {tuple(weights[key].shape)} (expected {tuple(expected[key].shape)})"
        for key in common
        if weights[key].shape != expected[key].shape
    ]
    dtypes = [
        f"{key} {weights[key].dtype} (expected {expected[key].dtype})"
        for key in common
        if weights[key].is_floating_point() != expected[key].is_floating_point() or weights[key].is_complex()
    ]
    if missing or unexpected or shapes or dtypes:
        raise ValueError(
            f"murf_fast.{type(module).__name__}: {checkpoint.origin} does not fit; missing keys: "
            f"{few(sorted(missing))}; unexpected keys: {few(sorted(unexpected))}; wrong shapes: {few(shapes)}; "
            f"wrong dtypes: {few(dtypes)}"
        )
    module.load_state_dict(weights)
