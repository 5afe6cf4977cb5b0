"""What every example needs: the bundled photos, a backbone, and a picture at the end."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from murf_fast.cli.demo import backbone

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
GAP = 8  # pixels between the parts of a picture
PALETTE = torch.tensor(
    [(215, 205, 190), (214, 39, 40), (31, 119, 180), (148, 103, 60), (44, 160, 44), (255, 127, 14), (148, 103, 189),
     (23, 190, 207)],
    dtype=torch.uint8,
)  # fmt: skip


def parser(text: str) -> argparse.ArgumentParser:
    """Options that all examples have."""
    made = argparse.ArgumentParser(description=text.splitlines()[0])
    made.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    made.add_argument("--weights", type=Path, help="folder of a Dinov2Model; else as `murf-fast demo` finds one")
    return made


def vit(weights: Path | None) -> nn.Module:
    """A frozen DINOv2 of transformers; its line says if its weights are random."""
    found = backbone.load(weights)
    print(f"backbone: {found.description}")
    return found.model


def photo(name: str) -> Tensor:
    """(1, 3, H, W) uint8: "coffee" or "chelsea"."""
    with as_file(files("murf_fast") / "assets" / f"{name}.jpg") as path, Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]


def normalized(image: Tensor) -> Tensor:
    """uint8 to ImageNet's units."""
    mean, std = (torch.tensor(IMAGENET[name]).reshape(1, 3, 1, 1) for name in ("mean", "std"))
    return (image.float() / 255 - mean) / std


def colours(components: Tensor) -> Tensor:
    """(3, H, W) of any range to (H, W, 3) uint8, each channel between its 1 % and 99 % quantiles."""
    flat = components.detach().float().flatten(1)
    low, high = torch.quantile(flat, torch.tensor([0.01, 0.99]), dim=1)
    shown = ((flat - low[:, None]) / (high - low).clamp_min(1e-12)[:, None]).clamp(0, 1)
    return (255 * shown).round().to(torch.uint8).reshape(components.shape).permute(1, 2, 0)


def painted(image: Tensor, labels: Tensor) -> Tensor:
    """(H, W, 3) uint8: labels (H, W) over the image (1, 3, H, W)."""
    over = PALETTE[labels.long() % len(PALETTE)].float()
    return (0.45 * image[0].permute(1, 2, 0).float() + 0.55 * over).round().to(torch.uint8)


def save(parts: Sequence[Tensor], path: Path, height: int = 300) -> None:
    """(H, W, 3) uint8 pictures side by side, as a JPEG of so many rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.fromarray(part.numpy()) for part in parts]
    images = [image.resize((round(image.width * height / image.height), height), Image.LANCZOS) for image in images]
    whole = Image.new("RGB", (sum(i.width for i in images) + GAP * (len(images) - 1), height), "white")
    left = 0
    for image in images:
        whole.paste(image, (left, 0))
        left += image.width + GAP
    whole.save(path, quality=85, optimize=True)
    print(f"picture: {path}")
