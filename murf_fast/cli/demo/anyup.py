"""AnyUp in small: trained from scratch, or from given weights on, on the bundled photos and a CPU in minutes.

    python -m murf_fast.cli.demo.anyup [--start anyup_paper.pth] [--weights FOLDER] [--steps 150] [--out anyup.pth]

The recipe is the paper's, on images half as large: crops whose features are the target, and both regularizers. The left
of every photo is trained on, the right is held out. The backbone is the demo's; with random weights its features mean
nothing and can be learned all the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from murf_fast import _arguments, _pillow
from murf_fast.cli.demo import backbone as backbones
from murf_fast.nn import (
    AnyUp,
    LocalCrops,
    MultiResolutionEncoder,
    augment_colors,
    cosine_mse_loss,
    input_consistency_loss,
    local_crops,
    self_consistency_loss,
)
from murf_fast.ops import resize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH, CROPS = 2, 4
REGULARIZERS = 0.1
RATE, FINE_TUNING_RATE = 5e-4, 2e-5  # the paper's is 2e-4, for 100,000 steps
MOST_STEPS = 1_000_000


class Progress(NamedTuple):
    """After ``step`` steps: the loss on held-out crops."""

    step: int
    loss: float


@dataclass
class Task:
    """A backbone, and the photos at twice the size that it sees.

    Args:
        backbone: Frozen, one that :class:`MultiResolutionEncoder` takes.
        patch_size: Of the backbone.
        patches: Of a side of what the backbone sees.
        seed: Of crops and colours.
    """

    backbone: nn.Module
    patch_size: int
    patches: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        _arguments.integer("demo.anyup", "patches", self.patches, 2)
        self.size = self.patches * self.patch_size
        self._encoder = MultiResolutionEncoder(self.backbone, [self.size], mean=MEAN, std=STD)
        self._generator = torch.Generator().manual_seed(self.seed)
        self._photos = photos()
        narrowest = min(min(p.shape[1], p.shape[2] // 2) for p in self._photos)
        if 2 * self.size > narrowest:
            raise ValueError(
                f"murf_fast.demo.anyup: `patches` of {self.patch_size} pixels must be at most "
                f"{narrowest // (2 * self.patch_size)}, as half a photo has {narrowest} columns, got {self.patches}"
            )
        corners = [(p, y) for p in self._photos for y in (0, p.shape[1] - 2 * self.size)]
        held_out = torch.stack([p[:, y : y + 2 * self.size, -2 * self.size :] for p, y in corners])
        self._held_out = local_crops(held_out, self.size, self.patch_size, count=CROPS, generator=self._generator)
        self._held_out_maps = self._features(self._held_out)

    def loss(self, model: AnyUp) -> Tensor:
        """Of one batch of the photos' left halves: the reconstruction, and a tenth of each regularizer."""
        crops = local_crops(self._batch(), self.size, self.patch_size, count=CROPS, generator=self._generator)
        features, target = self._features(crops)
        image = normalized(crops.guidance)
        augmented = normalized(augment_colors(crops.guidance, generator=self._generator))
        upsampled = model(image, features, crops.grid)
        regularizers = input_consistency_loss(upsampled, features)
        regularizers = regularizers + self_consistency_loss(model, image, augmented, features)
        return cosine_mse_loss(crops.cut(upsampled), target) + REGULARIZERS * regularizers

    @torch.no_grad()
    def held_out_loss(self, upsample: Callable[[Tensor, Tensor, tuple[int, int]], Tensor]) -> float:
        """The reconstruction's loss on crops of the photos' right."""
        features, target = self._held_out_maps
        upsampled = upsample(normalized(self._held_out.guidance), features, self._held_out.grid)
        return float(cosine_mse_loss(self._held_out.cut(upsampled), target))

    def _features(self, crops: LocalCrops) -> tuple[Tensor, Tensor]:
        """Of the images in small, and of the crops."""
        with torch.no_grad():
            return self._encoder(crops.guidance).maps[0], self._encoder(crops.crops).maps[0]

    def _batch(self) -> Tensor:
        """(BATCH, 3, 2 size, 2 size) in 0..1, squares of any scale of the left, some mirrored."""
        side, images = 2 * self.size, []
        for _ in range(BATCH):
            photo = self._photos[self._integer(len(self._photos))]
            height, width = photo.shape[1], photo.shape[2] - side
            square = side + self._integer(min(height, width) - side + 1)
            y, x = self._integer(height - square + 1), self._integer(width - square + 1)
            image = resize(photo[None, :, y : y + square, x : x + square], (side, side), antialias=True)
            images.append(image.flip(3) if self._integer(2) else image)
        return torch.cat(images)

    def _integer(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self._generator))


def train(task: Task, model: AnyUp, steps: int, every: int, rate: float) -> Iterator[Progress]:
    """Trains the model in place: the loss before the first step, after every ``every`` steps, and after the last.

    The rate falls to zero in a straight line.
    """
    steps = _arguments.integer("demo.anyup", "steps", steps, 0, MOST_STEPS)
    every = _arguments.integer("demo.anyup", "every", every, 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            yield Progress(step, task.held_out_loss(model))
        if step < steps:
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
            loss = task.loss(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def from_scratch(qk_dim: int = 128, seed: int = 0) -> AnyUp:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AnyUp(qk_dim)


def bilinear(image: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
    return resize(features, size)


def normalized(images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(v)[:, None, None] for v in (MEAN, STD))
    return (images - mean) / std


def photos() -> list[Tensor]:
    """The bundled photos, (3, H, W) in 0..1."""
    folder = files("murf_fast") / "assets"
    found = []
    for path in sorted((p for p in folder.iterdir() if p.name.endswith(".jpg")), key=lambda p: p.name):
        with as_file(path) as file:
            found.append(torch.from_numpy(_pillow.read(file)).permute(2, 0, 1).float() / 255)
    return found


def _steps(text: str) -> int:
    steps = int(text)
    if not 0 <= steps <= MOST_STEPS:
        raise argparse.ArgumentTypeError(f"must be 0 to {MOST_STEPS:,}, got {steps}")
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=Path, metavar="FILE", help="AnyUp's weights to go on from; none: from scratch")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="the backbone, a Dinov2Model's folder")
    parser.add_argument("--patches", type=int, default=8, metavar="N", help="of a side of what the backbone sees")
    parser.add_argument("--steps", type=_steps, default=150, metavar="N", help="optimizer steps, 0 to 1,000,000")
    parser.add_argument("--out", type=Path, default=Path("anyup.pth"), metavar="FILE", help="where the weights go")
    arguments = parser.parse_args()
    backbone = backbones.load(arguments.weights)
    print(f"backbone: {backbone.description}", flush=True)
    task = Task(backbone.model, backbone.patch, arguments.patches)
    model = AnyUp.from_checkpoint(arguments.start) if arguments.start else from_scratch()
    rate = FINE_TUNING_RATE if arguments.start else RATE
    print(f"bilinear: loss on held-out crops {task.held_out_loss(bilinear):.4f}", flush=True)
    begin = time.perf_counter()
    for step, loss in train(task, model, arguments.steps, 10, rate):
        seconds = time.perf_counter() - begin
        print(f"step {step:4d}: loss on held-out crops {loss:.4f}, {seconds:.0f} s", flush=True)
    torch.save(model.state_dict(), arguments.out)
    AnyUp.from_checkpoint(arguments.out)  # reads what was written
    print(f"weights: {arguments.out}")


if __name__ == "__main__":
    main()
