"""The vision transformer of the anomaly commands: any family that the encoder takes, and how its images are normalized.

``--weights`` is a folder or a hub name of transformers, ``timm:NAME[:CHECKPOINT]`` or ``hub:REPOSITORY:NAME``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from murf_fast.anomaly import _description
from murf_fast.anomaly._encoder import PatchAtLeast, normalization_of
from murf_fast.cli.demo import backbone
from murf_fast.nn.vit._pretrained import pretrained as _pretrained
from murf_fast.nn.vit.families import resolved

LONGEST_REASON = 300  # characters: loaders list every weight that is amiss


@dataclass(frozen=True)
class Weights:
    """A model, in eval mode, one line that says which one it is, and mean and deviation of its images."""

    model: torch.nn.Module
    description: str
    normalization: dict[str, Any]

    @property
    def blocks(self) -> int:
        """How many the model has."""
        inner, family = resolved(self.model)
        return len(family(inner).blocks)

    def encoder(self, layers: Sequence[int], scales: Sequence[float], norm: bool = False) -> PatchAtLeast:
        """What a detector encodes with; ``norm``: the final norm is applied to the layers."""
        return PatchAtLeast(self.model, scales=scales, layers=layers, norm=norm, **self.normalization)

    def encoder_of(self, bank: Path) -> PatchAtLeast:
        """What the detector in a folder encodes with."""
        told = _description.told(bank)
        return self.encoder(told["layers"], told["scales"] or (1.0,), told["norm"])


def load(named: str | Path | None, as_stored: bool = False) -> Weights:
    """The model that ``named``, else ``$MURF_FAST_WEIGHTS``, says, else DINOv2-S/14 from cache or hub; in float32, or
    ``as_stored``: those of transformers in the dtype of their file.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: What was named does not load, has not all weights of a
            vision transformer, or is of no family that the encoder takes.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    source = "--weights" if named else "$MURF_FAST_WEIGHTS"
    named = str(named or os.environ.get("MURF_FAST_WEIGHTS") or "")
    if not named:
        found = backbone.load(None)
        if found.is_random:
            raise ValueError(
                "no weights named or reachable, and random ones find no anomaly: name a folder by --weights"
            )
        return Weights(found.model, found.description, normalization_of(found.model))
    kind, _, rest = named.partition(":")
    try:
        if kind in ("timm", "hub") and rest:
            model, normalization = (_timm if kind == "timm" else _torch_hub)(rest), None
        else:
            model, normalization = _transformers(named, source, "auto" if as_stored else torch.float32)
        normalization = normalization or normalization_of(model)
    except (ModuleNotFoundError, FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # the loaders of damaged files raise anything
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise ValueError(f"{source}: {named} holds no vision transformer that loads: {reason}") from error
    name = Path(named).name if kind not in ("timm", "hub") else named
    description = f"{type(model).__name__} from {source}, {name} ({_shape(model)})"
    return Weights(model.eval().requires_grad_(False), description, normalization)


def _shape(model: torch.nn.Module) -> str:
    inner, family = resolved(model)
    vit = family(inner)
    channels = vit.projection.weight.shape[0]
    return f"{len(vit.blocks)} blocks, {channels} channels, patch {vit.patch_size}"


def _transformers(named: str, source: str, dtype: torch.dtype | str) -> tuple[torch.nn.Module, dict[str, Any] | None]:
    folder = Path(named).expanduser()
    if folder.is_dir():
        return _pretrained(str(folder), dtype, local_files_only=True)
    if folder.is_absolute() or named.startswith(("./", "../", "~")) or named.count("/") > 1 or folder.exists():
        raise FileNotFoundError(f"{source} must be a folder with config.json and model.safetensors, got {named}")
    try:
        return _pretrained(named, dtype, local_files_only=True)
    except OSError:
        if not backbone.hub_reachable():
            raise FileNotFoundError(
                f"{source}: {named} is no folder and not in the local Hugging Face cache, and the hub cannot be reached"
            ) from None
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
    return _pretrained(named, dtype, local_files_only=False)


def _timm(named: str) -> torch.nn.Module:
    import timm

    name, _, checkpoint = named.rpartition(":")
    if not name or not Path(checkpoint).expanduser().is_file():  # "hf-hub:timm/..." is one name
        name, checkpoint = named, ""
    given = {"checkpoint_path": str(Path(checkpoint).expanduser())} if checkpoint else {"pretrained": True}
    return timm.create_model(name, dynamic_img_size=True, **given)  # with its head, which checkpoints have


def _torch_hub(named: str) -> torch.nn.Module:
    """A clone's folder, or owner/repository as of torch.hub, whose ``hubconf.py`` is run; and an entry of it."""
    repository, _, name = named.rpartition(":")
    is_local = Path(repository).expanduser().is_dir()
    repository = str(Path(repository).expanduser()) if is_local else repository
    return torch.hub.load(repository, name, source="local" if is_local else "github")
