"""SigLIP-HD in small: a student at one scale learns its teacher's multi-scale average, on a CPU in seconds.

    python -m murf_fast.cli.demo.siglip_hd [--steps 80]

Teacher and student start as the same tiny SigLIP tower with seeded random weights: the point is the training loop,
which is that of the real model. The student sees crops of the bundled photos at the base scale, the teacher at twice
that.
"""

from __future__ import annotations

import argparse
import copy
from importlib.resources import as_file, files

import torch
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from murf_fast import _arguments, _pillow
from murf_fast.nn import MultiResolutionEncoder, fine_to_coarse_loss, multi_scale_target

BASE = 64  # pixels; the teacher also sees 2 x 2 tiles of 2 * BASE
BATCH = 8
MOST_STEPS = 1_000_000
NORMALIZATION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def train(steps: int = 80, every: int = 10, seed: int = 0) -> list[float]:
    """The loss on one held-out batch, before the first step and after every ``every`` steps."""
    steps = _arguments.integer("demo.siglip_hd", "steps", steps, 0, MOST_STEPS)
    every = _arguments.integer("demo.siglip_hd", "every", every, 1)
    generator = torch.Generator().manual_seed(seed)
    teacher = _tower(seed)
    student = MultiResolutionEncoder(
        copy.deepcopy(teacher).requires_grad_(True), [BASE], antialias=True, **NORMALIZATION
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, betas=(0.9, 0.99), weight_decay=0.0)
    photos = _photos()

    def loss_on(images: Tensor) -> Tensor:
        target = multi_scale_target(teacher, images, (1, 2), size=BASE, **NORMALIZATION)
        return fine_to_coarse_loss(student(images).maps[0], target)

    held_out, losses = _crops(photos, generator), []
    for step in range(steps + 1):
        if step % every == 0:
            with torch.no_grad():
                losses.append(float(loss_on(held_out)))
        loss = loss_on(_crops(photos, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def _tower(seed: int) -> SiglipVisionModel:
    config = SiglipVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=BASE, patch_size=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SiglipVisionModel(config).eval().requires_grad_(False)


def _photos() -> list[Tensor]:
    """The bundled photos, (3, H, W) uint8."""
    folder = files("murf_fast") / "assets"
    paths = sorted((p for p in folder.iterdir() if p.name.endswith(".jpg")), key=lambda p: p.name)
    photos = []
    for path in paths:
        with as_file(path) as file:
            photos.append(torch.from_numpy(_pillow.read(file)).permute(2, 0, 1))
    return photos


def _crops(photos: list[Tensor], generator: torch.Generator) -> Tensor:
    """(BATCH, 3, 2 BASE, 2 BASE) uint8."""
    side, crops = 2 * BASE, []
    for _ in range(BATCH):
        photo = photos[int(torch.randint(len(photos), (), generator=generator))]
        y, x = (int(torch.randint(n - side + 1, (), generator=generator)) for n in photo.shape[1:])
        crops.append(photo[:, y : y + side, x : x + side])
    return torch.stack(crops)


def _steps(text: str) -> int:
    steps = int(text)
    if not 0 <= steps <= MOST_STEPS:
        raise argparse.ArgumentTypeError(f"must be 0 to {MOST_STEPS:,}, got {steps}")
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=_steps, default=80, metavar="N", help="optimizer steps, 0 to 1,000,000")
    every = 10
    for i, loss in enumerate(train(parser.parse_args().steps, every)):
        print(f"step {every * i:4d}: loss on a held-out batch {loss:.4f}")


if __name__ == "__main__":
    main()
