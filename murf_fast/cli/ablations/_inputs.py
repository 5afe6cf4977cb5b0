"""What the ablations look at: a frozen backbone, squares of the bundled photos, and how alike two maps are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from murf_fast.cli.demo import backbone as backbones
from murf_fast.cli.demo.anyup import MEAN, STD, photos
from murf_fast.ops import resize

HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and deviation


@dataclass(frozen=True)
class Model:
    """A frozen tower, its patches in pixels, the normalization it was trained with, and what to say of it."""

    tower: nn.Module
    patch: int
    description: str
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @property
    def normalization(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std}


def load(weights: Path | None, option: str = "--weights") -> Model:
    """A folder of a SigLIP vision tower or of a Dinov2Model; without one the demo's backbone.

    Raises:
        OSError, ValueError: The folder holds neither; the message names the option.
    """
    if weights is not None and _kind(weights) in ("siglip", "siglip_vision_model"):
        from transformers import SiglipVisionModel

        try:
            tower = SiglipVisionModel.from_pretrained(weights, dtype=torch.float32)
        except (ModuleNotFoundError, MemoryError):
            raise
        except Exception as error:  # the loaders of damaged files raise anything
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{option}: {weights} holds no SiglipVisionModel that loads: {reason}") from error
        named = f"SiglipVisionModel from {option}, {weights.name}"
        return Model(tower.eval().requires_grad_(False), tower.config.patch_size, named, HALF, HALF)
    found = backbones.load(weights)
    return Model(found.model, found.patch, found.description)


def _kind(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None  # the loader says what is wrong


def squares(side: int) -> Tensor:
    """The middle of every bundled photo, (photos, 3, side, side) in 0..1."""
    found = []
    for photo in photos():
        height, width = photo.shape[1:]
        n = min(height, width)
        y, x = (height - n) // 2, (width - n) // 2
        found.append(resize(photo[None, :, y : y + n, x : x + n], (side, side), antialias=True))
    return torch.cat(found)


def cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine similarity of the vectors of two maps (B, C, h, w), place by place."""
    return float(torch.cosine_similarity(a.double(), b.double(), dim=1).mean())


def distance(a: Tensor, b: Tensor) -> float:
    """Mean absolute difference."""
    return float((a.double() - b.double()).abs().mean())


def cka(a: Tensor, b: Tensor) -> float:
    """Linear centered kernel alignment of two maps (B, C, h, w) whose channels may differ in number.

    ``|A^T B|^2 / (|A^T A| |B^T B|)`` in Frobenius norms, with rows for places, less their mean: 1 for maps that differ
    by a rotation, a factor and an offset. Source: Kornblith et al., arXiv 1905.00414, equation 3 with a linear kernel.
    """
    x, y = (m.double().flatten(2).mT.flatten(0, 1) for m in (a, b))
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x.T @ y).norm().square() / ((x.T @ x).norm() * (y.T @ y).norm()))
