"""The frozen vision transformer of the demo, and where its weights come from."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants
from transformers import AutoConfig, Dinov2Config, Dinov2Model
from transformers.utils import logging

HUB_NAME = "facebook/dinov2-small"
SEED = 0
REACH_SECONDS = 3.0


@dataclass(frozen=True)
class Backbone:
    """A model with Hugging Face's ``Dinov2Model`` interface, and one line that says which one it is."""

    model: torch.nn.Module
    description: str
    is_random: bool = False

    @property
    def patch(self) -> int:
        return cast("Any", self.model).config.patch_size


def load(weights: Path | None = None) -> Backbone:
    """The backbone: ``weights``, else ``$MURF_FAST_WEIGHTS``, else DINOv2-S/14 from cache or hub, else random weights.

    Only the last two steps may be passed over; weights that were named and do not load raise.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    named = weights or os.environ.get("MURF_FAST_WEIGHTS")
    if named:
        source = "--weights" if weights else "$MURF_FAST_WEIGHTS"
        path = Path(named).expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"{source} must be a folder with config.json and model.safetensors, got {path}")
        try:
            model = _pretrained(path)
        except (ModuleNotFoundError, MemoryError):
            raise
        except Exception as error:  # the loaders of damaged files raise anything
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{source}: {path} holds no Dinov2Model that loads: {reason}") from error
        return _described(model, f"Dinov2Model from {source}, {path.name}")
    try:
        return _described(_pretrained(HUB_NAME, local_files_only=True), f"{HUB_NAME} from the local Hugging Face cache")
    except OSError:
        pass
    if hub_reachable():
        # Read by huggingface_hub for every request; a stalled download must not stall the demo.
        os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
        try:
            return _described(_pretrained(HUB_NAME), f"{HUB_NAME} from the Hugging Face hub")
        except OSError:
            pass
    where = f"RANDOM weights (seed {SEED}) in the shape of {HUB_NAME}: no weights named or reachable"
    return dataclasses.replace(_described(_random(), where), is_random=True)


def _described(model: Any, where: str) -> Backbone:
    config = model.config
    shape = f"{config.num_hidden_layers} blocks, {config.hidden_size} channels, patch {config.patch_size}"
    return Backbone(model.eval().requires_grad_(False), f"{where} ({shape})")


def _pretrained(name: str | Path, **options: Any) -> torch.nn.Module:
    kind = AutoConfig.from_pretrained(name, **options).model_type
    if kind != "dinov2":
        raise ValueError(f"the demo's backbone must be a Dinov2Model, {name} holds a model of type {kind!r}")
    return Dinov2Model.from_pretrained(name, dtype=torch.float32, **options)


def _random() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Dinov2Model(
            Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
        )


def hub_reachable() -> bool:
    """Whether the hub's host answers within seconds. In a thread, as name resolution knows no timeout."""
    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def connect() -> None:
        address = urlsplit(constants.ENDPOINT)
        port = address.port or (443 if address.scheme == "https" else 80)
        try:
            with socket.create_connection((address.hostname, port), timeout=REACH_SECONDS):
                answered.set()
        except OSError:
            pass

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return answered.is_set()
