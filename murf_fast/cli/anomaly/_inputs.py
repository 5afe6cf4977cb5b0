"""The model of the commands, and the device it runs on."""

from __future__ import annotations

import torch

from murf_fast.cli.anomaly.weights import Weights, load


def encoder(weights: str | None, *, as_stored: bool = False) -> Weights:
    """In float32, unless wanted in the dtype of the file."""
    return load(weights, as_stored)


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
