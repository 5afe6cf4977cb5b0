"""SigLIP-HD in small: a student at one scale learns its teacher's multi-scale average, on a CPU in seconds.

    python -m murf_fast.cli.demo.siglip_hd [--steps 80] [--factors 1,2] [--tiling disjoint] [--loss l1]

Teacher and student start as the same tiny SigLIP tower with seeded random weights: the point is the training loop,
which is that of the real model, and its schedule: AdamW, a linear warm-up, a cosine. The student sees crops of the
bundled photos at the base scale, the teacher at every factor of that.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from importlib.resources import as_file, files
from typing import Any, cast

import torch
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from murf_fast import _arguments, _pillow
from murf_fast.nn import MultiResolutionEncoder, fine_to_coarse_loss, multi_scale_target
from murf_fast.nn.vit.siglip_hd import LOSSES, TILINGS

BASE = 64  # pixels; the teacher also sees 2 x 2 tiles of 2 * BASE
BATCH = 8
MOST_STEPS = 1_000_000
MOST_FACTOR = 4  # of the paper, and of what the photos hold
RATE = 3e-4  # the paper's is 5e-5, for 90,000 steps of 512 images
WEIGHT_DECAY = 0.04
WARM_UP = 4 / 90  # of the steps
NORMALIZATION: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def train(
    steps: int = 80,
    every: int = 10,
    seed: int = 0,
    *,
    factors: Sequence[int] = (1, 2),
    tiling: str = "disjoint",
    loss: str = "l1",
) -> list[float]:
    """The loss on one held-out batch, before the first step and after every ``every`` steps.

    ``factors`` and ``tiling`` are those of :func:`multi_scale_target`, ``loss`` is :func:`fine_to_coarse_loss`'s kind.
    """
    steps = _arguments.integer("demo.siglip_hd", "steps", steps, 0, MOST_STEPS)
    every = _arguments.integer("demo.siglip_hd", "every", every, 1)
    generator = torch.Generator().manual_seed(seed)
    teacher = _tower(seed)
    student = MultiResolutionEncoder(
        copy.deepcopy(teacher).requires_grad_(True), [BASE], antialias=True, **NORMALIZATION
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate(step, steps))
    photos, side = _photos(), max(factors) * BASE

    def loss_on(images: Tensor) -> Tensor:
        target = multi_scale_target(teacher, images, factors, size=BASE, tiling=cast("Any", tiling), **NORMALIZATION)
        return fine_to_coarse_loss(student(images).maps[0], target, cast("Any", loss))

    held_out, losses = _crops(photos, side, generator), []
    for step in range(steps + 1):
        if step % every == 0:
            with torch.no_grad():
                losses.append(float(loss_on(held_out)))
        if step < steps:
            optimizer.zero_grad()
            loss_on(_crops(photos, side, generator)).backward()
            optimizer.step()
            schedule.step()
    return losses


def share_of_rate(step: int, steps: int) -> float:
    """Of the learning rate, in the ``step``-th of ``steps``, counted from 0: up in a line, down in a cosine to 0."""
    warm_up = math.ceil(WARM_UP * steps)
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2


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


def _crops(photos: list[Tensor], side: int, generator: torch.Generator) -> Tensor:
    """(BATCH, 3, side, side) uint8."""
    crops = []
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


def _factors(text: str) -> list[int]:
    factors = [int(f) for f in text.split(",")]
    if not all(1 <= f <= MOST_FACTOR for f in factors):
        raise argparse.ArgumentTypeError(f"must be integers from 1 to {MOST_FACTOR}, got {text}")
    return factors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=_steps, default=80, metavar="N", help="optimizer steps, 0 to 1,000,000")
    parser.add_argument(
        "--factors", type=_factors, default=[1, 2], metavar="F,F", help="scales, as multiples of the base"
    )
    parser.add_argument("--tiling", choices=TILINGS, default=TILINGS[0], help="how the finer scales are encoded")
    parser.add_argument("--loss", choices=LOSSES, default=LOSSES[0])
    asked, every = vars(parser.parse_args()), 10
    for i, loss in enumerate(train(every=every, **asked)):
        print(f"step {every * i:4d}: loss on a held-out batch {loss:.4f}")


if __name__ == "__main__":
    main()
