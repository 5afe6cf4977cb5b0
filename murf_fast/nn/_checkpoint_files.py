"""State dicts from files or from the caller, out of what training loops wrap them in."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Entries of a checkpoint that hold the weights, beside optimizers and the like; `jafar` is JAFAR's own, `model_state`
# FeatSharp's.
WRAPPERS = ("state_dict", "model", "teacher", "jafar", "model_state")
# What DataParallel, torch.compile and training loops put before every name.
PREFIXES = ("module.", "_orig_mod.", "model.", "teacher.")

_TORCH_SAVE = (b"PK\x03\x04", b"\x80")  # the zip archive, and the pickle of older versions


@dataclass(frozen=True)
class Checkpoint:
    """Weights by their names, and how messages call where they come from."""

    origin: str
    weights: dict[str, Tensor]


def open_checkpoint(what: str, checkpoint: str | PathLike[str] | Mapping[str, Any]) -> Checkpoint:
    """The weights of a file or a state dict, unwrapped.

    Raises:
        TypeError: ``checkpoint`` is neither a path nor a mapping.
        ValueError: The file cannot be read, or holds no weights; the message names it.
    """
    if isinstance(checkpoint, Mapping):
        return Checkpoint("the checkpoint", unwrapped(f"{what}: the checkpoint", checkpoint))
    if not isinstance(checkpoint, (str, PathLike)):
        got = type(checkpoint).__name__
        raise TypeError(f"murf_fast.{what}: `checkpoint` must be a path or a state dict, got {got}")
    origin = f"the checkpoint {Path(checkpoint).name}"
    return Checkpoint(origin, unwrapped(f"{what}: {origin}", _contents(what, Path(checkpoint))))


def unwrapped(where: str, state: object) -> dict[str, Tensor]:
    """The innermost of :data:`WRAPPERS`, without the :data:`PREFIXES` that all of its names have."""
    while isinstance(state, Mapping):
        inner = next((state[name] for name in WRAPPERS if isinstance(state.get(name), Mapping)), None)
        if inner is None:
            break
        state = inner
    if not isinstance(state, Mapping):
        raise ValueError(f"murf_fast.{where} must hold weights by their names, got {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"murf_fast.{where} must hold tensors by their names, got {type(value).__name__} under {name!r}"
            )
    weights = dict(state)
    while prefix := next((p for p in PREFIXES if weights and all(name.startswith(p) for name in weights)), None):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _contents(what: str, path: Path) -> object:
    """What a ``.safetensors`` file or a file of torch.save holds."""
    where = f"murf_fast.{what}: the checkpoint {path}"
    if not path.is_file():
        raise ValueError(f"{where} {'is not a regular file' if path.exists() else 'does not exist'}")
    try:
        with path.open("rb") as file:
            begin = file.read(9)
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error}") from error
    if not begin:
        raise ValueError(f"{where} is empty")
    if path.suffix == ".safetensors":
        return _safetensors(where, path)
    if not begin.startswith(_TORCH_SAVE):
        hint = "; it holds safetensors, which end in .safetensors" if begin.endswith(b"{") else ""
        raise ValueError(f"{where} is no file of torch.save{hint}")
    return _torch_save(where, path)


def _safetensors(where: str, path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # its own class, and Python's for headers that are no JSON
        raise ValueError(f"{where} is no whole file of safetensors: {error}") from error


def _torch_save(where: str, path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        if isinstance(error, pickle.UnpicklingError) and "Unsupported global" in str(error):
            raise ValueError(
                f"{where} holds more than tensors and plain values, and unpickling that could run any code; load it "
                f"yourself if you trust it and pass its state dict. torch says: {error}"
            ) from error
        raise ValueError(f"{where} is no whole file of torch.save: {str(error) or type(error).__name__}") from error
