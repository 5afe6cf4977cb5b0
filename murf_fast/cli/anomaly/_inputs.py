"""The model of the commands, and the device it runs on."""

from __future__ import annotations

from pathlib import Path

import torch

from murf_fast.anomaly._description import OtherEncoderError
from murf_fast.anomaly.detector import MultiResolutionDetector
from murf_fast.anomaly.ray_workers import RayWorkers
from murf_fast.cli.anomaly.weights import Weights, load


def encoder(weights: str | None, *, as_stored: bool = False) -> Weights:
    """In float32, unless wanted in the dtype of the file."""
    return load(weights, as_stored)


def loaded(
    bank: Path,
    weights: str | None,
    device: torch.device,
    *,
    any_precision: bool = False,
    cluster: RayWorkers | None = None,
) -> tuple[Weights, MultiResolutionDetector]:
    """The detector in a folder, and the weights that it is loaded with: in float32, else in the dtype of their file."""
    vit = encoder(weights)
    try:
        return vit, _loaded(bank, vit, device, any_precision, cluster)
    except OtherEncoderError:
        vit = encoder(weights, as_stored=True)  # halves were rounded before they became float32
        if next(vit.model.parameters()).dtype == torch.float32:
            raise
        return vit, _loaded(bank, vit, device, any_precision, cluster)


def _loaded(
    bank: Path, vit: Weights, device: torch.device, any_precision: bool, cluster: RayWorkers | None
) -> MultiResolutionDetector:
    vit.model.to(device)
    return MultiResolutionDetector.load(bank, vit.encoder_of(bank), any_precision=any_precision, cluster=cluster)


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
