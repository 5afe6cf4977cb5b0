"""The model of the commands, and the device it runs on."""

from __future__ import annotations

from pathlib import Path

import torch

from murf_fast.cli.demo import backbone


def encoder(weights: Path | None) -> backbone.Backbone:
    found = backbone.load(weights)
    if found.is_random:
        raise ValueError("no weights named or reachable, and random ones find no anomaly: name a folder by --weights")
    return found


def device_of(name: str) -> torch.device:
    """A device that is here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device must be cpu, cuda or cuda:1, and be there, got {name!r}: {_first(error)}"
        ) from error
    return device


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
